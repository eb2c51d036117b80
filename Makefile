# `make demo` and `make test` do everything on a fresh machine with Python 3.11+, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CORPUS := data/corpus/stdlib.jsonl

export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= disabled

.PHONY: demo test lint docs torture dist clean

# torch first: its pinned build then satisfies every other package's wish for some torch.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "actstore needs Python 3.11 or newer: make PYTHON=python3.11 …"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), 2.3 GB: some minutes, in which nothing is printed"
	$(BIN)/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(CORPUS): $(VENV)/.installed data/build_corpus.py
	$(BIN)/python data/build_corpus.py $@

demo: $(CORPUS)
	@bash data/demo.sh $(BIN) $(CORPUS)

test: $(CORPUS)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site (its search: python -m http.server -d build/site). Not in CI: tests/test_docs.py tests what breaks.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

# Hours; the same pieces at CI size are in `make test`. As root: it mounts small file systems.
torture: $(VENV)/.installed
	PYTHONPATH=.:tests $(BIN)/python -m harness.torture --scale long --write

# dist/: the last commit as source archive and wheel; two wheels of one commit are equal byte for byte.
dist: $(VENV)/.installed
	rm -rf dist build && mkdir -p build/source && git archive HEAD | tar x -C build/source
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/python -m build --no-isolation --outdir dist build/source
	sha256sum dist/*

clean:
	rm -rf $(VENV) data/corpus build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
