"""Promise 10: each row of the fault matrix (reliability.md, section 5) has a test, and each error one message and code."""

from __future__ import annotations

import ast
import re

import click
import pytest
from actstore_cli import output
from click.testing import CliRunner
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from actstore import errors
from actstore.digests import check_prefix
from actstore.errors import ActstoreError, UsageError

# Rows that other files of tests/promises/ cover name them here once they are in; None: not covered by a test yet.
COVERED: dict[int, str | None] = {
    1: "tests/actstore/test_store.py::test_killed_at_many_steps_a_capture_resumes_to_the_same_content",
    2: None,
    3: None,
    4: "tests/cli/test_commands.py::test_ctrl_c_and_sigterm_on_the_real_command_resume_to_the_same_store",
    5: "tests/cli/test_commands.py::test_no_disk_space_is_found_before_the_start_and_nothing_is_lost",
    6: "tests/actstore/test_durable.py::test_a_file_is_synced_before_its_rename_and_its_folder_after",
    7: None,
    8: "tests/promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    9: "tests/promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    10: "tests/promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    11: "tests/actstore/test_files.py::test_a_chunk_cut_short_while_mapped_ends_training_with_a_message",
    12: None,
    13: "tests/actstore/test_files.py::test_a_refused_lock_names_process_host_and_time",
    14: "tests/actstore/test_files.py::test_an_unsealed_store_says_how_far_it_is",
    15: "tests/trainer/test_fit.py::test_a_store_being_read_is_not_removed_and_a_run_has_one_writer",
    16: None,
    17: "tests/test_structure.py::test_time_decides_nothing",
    18: "tests/promises/test_05_no_invented_data.py::test_a_model_that_goes_wrong_at_any_row_seals_nothing",
    19: "tests/promises/test_05_no_invented_data.py::test_overflow_is_refused_and_the_largest_value_kept",
    20: "tests/trainer/test_fit.py::test_a_diverging_loss_ends_with_step_and_rate",
    21: "tests/actstore/test_corpus.py::test_a_bad_line_names_file_and_line_or_is_skipped_and_counted",
    22: "tests/actstore/test_corpus.py::test_empty_documents_are_counted_and_limits_end_the_reading",
    23: "tests/actstore/test_corpus.py::test_a_line_of_a_gibibyte_is_refused_in_bounded_memory",
    24: "tests/actstore/test_corpus.py::test_a_corpus_edited_between_the_passes_is_refused_and_nothing_sealed",
    25: None,
    26: "tests/promises/test_10_every_fault_has_a_name.py::test_only_digits_of_a_digest_ever_become_a_prefix",
    27: "tests/promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    28: "tests/actstore/test_fuzz.py::test_five_thousand_malformed_inputs_for_each_parser",
    29: "tests/promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    30: "tests/promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    31: "tests/promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    32: "tests/cli/test_commands.py::test_damage_exits_1_and_a_foreign_version_7",
    33: "tests/promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    34: "tests/actstore/test_files.py::test_everything_but_writing_works_on_a_read_only_medium",
    35: "tests/actstore/test_files.py::test_a_network_file_system_is_recognized",
    36: "tests/trainer/test_fit.py::test_killed_it_goes_on_from_the_newest_checkpoint_that_verifies",
    37: "tests/cli/test_commands.py::test_bad_input_to_the_trainer",
    38: None,
}
OPEN = {2, 3, 7, 12, 16, 25, 38}  # work of other branches; the list may only shrink
EXIT_CODES = {
    "StoreDamaged": 1, "UsageError": 2, "CorpusError": 3, "KeyMismatch": 3, "NonFiniteActivation": 3, "StoreLocked": 4,
    "StoreNotFound": 5, "StoreNotSealed": 5, "DiskFull": 6, "StorageFailed": 6, "FormatError": 7, "TrainingDiverged": 8,
}  # fmt: skip


def test_every_row_of_the_matrix_is_accounted_for():
    assert sorted(COVERED) == list(range(1, 39))
    assert {row for row, test in COVERED.items() if test is None} == OPEN


@pytest.mark.parametrize("row", [row for row, test in COVERED.items() if test])
def test_the_test_of_a_row_exists(row):
    path, _, name = COVERED[row].partition("::")
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"row {row}: {COVERED[row]}"


def run_command_that_raises(error: BaseException):
    @click.command()
    @output.command
    def command() -> None:
        raise error

    return CliRunner().invoke(command, [])


def test_there_are_exactly_the_twelve_classes_and_their_codes():
    found = {c.__name__: c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, ActstoreError)}
    assert found.pop("ActstoreError") == 70 and found == EXIT_CODES


@pytest.mark.parametrize("name", EXIT_CODES)
def test_an_error_is_one_message_its_code_and_no_traceback(name):
    result = run_command_that_raises(getattr(errors, name)("what it is", "where it lies", "what to do"))
    assert result.exit_code == EXIT_CODES[name] and result.stdout == ""
    assert result.stderr == f"{name}: what it is\n  where: where it lies\n  do: what to do\n"


def test_a_bug_of_ours_is_70_with_a_traceback_and_signals_are_128_and_more():
    result = run_command_that_raises(KeyError("x"))
    assert result.exit_code == 70 and "Traceback" in result.stderr and "a bug in actstore" in result.stderr
    for error, code in ((KeyboardInterrupt(), 130), (output.TerminatedError(), 143)):
        result = run_command_that_raises(error)
        assert result.exit_code == code and "Traceback" not in result.stderr and "run the same command again" in result.stderr


@given(
    st.one_of(
        st.text(), st.from_regex(r"[0-9a-fA-F./\x00]{0,70}", fullmatch=True), st.sampled_from(["../x", "/etc", "abc", "a\0"])
    )
)
def test_only_digits_of_a_digest_ever_become_a_prefix(text):
    if re.fullmatch(r"[0-9a-f]{4,64}", text) and not text.endswith("\n"):
        assert check_prefix(text) == text
    else:
        with pytest.raises(UsageError):
            check_prefix(text)
