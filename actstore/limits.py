"""Every ceiling, with its unit and reason. Input beyond one is refused, never truncated in silence."""

from __future__ import annotations

MIB = 1 << 20

# Corpus.
MAX_TEMPLATE_BYTES = MIB  # of a chat template
MAX_DOCUMENT_BYTES = 64 * MIB  # one JSONL line or text file; longer is a broken file, and it is held in memory whole
MAX_CORPUS_FILES = 100_000  # each is listed in the key

# Sequences.
MIN_SEQ_LEN = 2  # BOS and one token
MAX_SEQ_LEN = 1 << 20  # tokens; beyond any published context length

# Store.
MIN_GROUP_ROWS = 1024  # rows; keeps the raw part of a chunk a multiple of the 4096-byte page for d_model >= 2
MAX_CHUNK_BYTES = 32 * MIB  # one row group of `acts`: 0.1 ms a MiB to digest, and little is lost at a crash
MAX_D_MODEL = 1 << 20  # coordinates of one activation
MAX_ROWS = 1 << 48  # rows of one store
MAX_NORM_BIN = 4800  # 2**150: the norm of MAX_D_MODEL largest float32 values is 2**138, the smallest value 2**-149

# Text files of ours, read whole before parsing.
MAX_KEY_BYTES = 8 * MIB  # a key lists its corpus files
MAX_RECORD_BYTES = 64 * MIB  # statistics take 3 hexadecimal float64 a coordinate
MAX_MANIFEST_BYTES = 32 * MIB  # 67 bytes a row group: half a million groups, 16 TB of activations
MAX_LISTED_GROUPS = 8192  # in a manifest; more are kept as a table, and their files looked at when they are first read
MAX_TABLE_BYTES = 256 * MIB  # that table, 32 bytes a row group: 8 million, 280 TB of activations; held in memory
MAX_VOCABULARY_BYTES = 16 * MIB  # the largest vocabularies, of 260,000 tokens, take 5
MAX_CONFIG_BYTES = 1 * MIB  # a run's result or the commit of a checkpoint
MAX_TOML_BYTES = 8 << 10  # a user's config file; Python's TOML parser takes quadratic time for some
MAX_HEADER_BYTES = 1 * MIB  # a safetensors header; ours have at most fourteen tensors
MAX_METRICS_BYTES = 16 * MIB  # a run's log: 200 lines of 300 bytes, and what a crash left behind the last checkpoint
MAX_JSON_VALUES = 1_000_000  # commas or brackets: each value costs a hundred times its bytes once parsed
MAX_JSON_FIELDS = 10_000  # of one object: a histogram of norms has up to 2 MAX_NORM_BIN + 1
MAX_JSON_DEPTH = 32  # objects and lists in each other; ours need 6
MAX_JSON_DIGITS = 20  # of an integer: 2**64 has 20; Python parses longer ones in quadratic time

# Processes that share one capture (each looks at every row group) or one fit.
MAX_WORKERS = 4096

# Disk kept free by a capture, so that a full disk never stops the rest of the machine.
MIN_FREE_BYTES = 256 * MIB
