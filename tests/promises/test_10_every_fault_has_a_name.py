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

# Paths below tests/.
COVERED = {
    1: "promises/test_02_all_or_nothing.py::test_killed_at_every_step_no_third_state_opens",
    2: "promises/test_03_resume_is_exact.py::test_the_real_command_killed_at_random_times_ends_at_the_same_digest",
    3: "promises/test_01_committed_is_durable.py::test_power_losses_of_a_real_file_system_take_nothing_committed",
    4: "cli/test_commands.py::test_ctrl_c_on_the_real_command_resumes_to_the_same_store",
    5: "promises/test_01_committed_is_durable.py::test_a_full_disk_is_named_and_takes_nothing_committed",
    6: "promises/test_03_resume_is_exact.py::test_every_failing_call_has_a_name_and_the_rerun_ends_at_the_same_digest",
    7: "promises/test_02_all_or_nothing.py::test_every_call_that_changes_the_disk_is_announced_and_can_fail",
    8: "promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    9: "promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    10: "promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    11: "actstore/test_files.py::test_a_chunk_cut_short_while_mapped_ends_training_with_a_message",
    12: "actstore/test_durable.py::test_a_forked_child_does_not_keep_its_dead_parents_lock",
    13: "promises/test_06_one_writer_a_row_group.py::test_races_of_captures_of_workers_and_of_readers",
    14: "promises/test_06_one_writer_a_row_group.py::test_races_of_captures_of_workers_and_of_readers",
    15: "trainer/test_fit.py::test_a_store_being_read_is_not_removed_and_a_run_has_one_writer",
    16: "promises/test_02_all_or_nothing.py::test_killed_at_every_step_no_third_state_opens",
    17: "promises/test_11_the_key_is_honest.py::test_a_jumping_clock_changes_nothing",
    18: "promises/test_05_no_invented_data.py::test_a_model_that_goes_wrong_at_any_row_seals_nothing",
    19: "promises/test_05_no_invented_data.py::test_overflow_is_refused_and_the_largest_value_kept",
    20: "trainer/test_fit.py::test_a_diverging_loss_ends_with_step_and_rate",
    21: "actstore/test_corpus.py::test_a_bad_line_names_file_and_line_or_is_skipped_and_counted",
    22: "actstore/test_corpus.py::test_empty_documents_are_counted_and_limits_end_the_reading",
    23: "actstore/test_corpus.py::test_a_line_of_a_gibibyte_is_refused_in_bounded_memory",
    24: "actstore/test_corpus.py::test_a_corpus_edited_between_the_passes_is_refused_and_nothing_sealed",
    25: "promises/test_13_damage_is_repairable.py::test_another_model_corpus_or_setting_is_a_mismatch_that_names_the_field",
    26: "promises/test_10_every_fault_has_a_name.py::test_only_digits_of_a_digest_ever_become_a_prefix",
    27: "promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    28: "actstore/test_fuzz.py::test_five_thousand_malformed_inputs_for_each_parser",
    29: "promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    30: "promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    31: "promises/test_08_data_is_never_code.py::test_an_attack_ends_in_exactly_one_of_our_errors",
    32: "promises/test_12_old_stores_stay_readable.py::test_an_unknown_version_is_refused_by_both_numbers",
    33: "promises/test_04_damage_is_found.py::test_ten_thousand_damages_are_found_and_none_is_served",
    34: "actstore/test_files.py::test_everything_but_writing_works_on_a_read_only_medium",
    35: "actstore/test_files.py::test_a_network_file_system_is_recognized",
    36: "trainer/test_fit.py::test_killed_it_goes_on_from_the_newest_checkpoint_that_verifies",
    37: "cli/test_commands.py::test_bad_input_to_the_trainer",
    38: "promises/test_13_damage_is_repairable.py::test_a_group_that_comes_out_different_is_refused_naming_the_first_row",
}
EXIT_CODES = {
    "StoreDamaged": 1, "UsageError": 2, "CorpusError": 3, "KeyMismatch": 3, "NonFiniteActivation": 3, "StoreLocked": 4,
    "StoreNotFound": 5, "StoreNotSealed": 5, "DiskFull": 6, "StorageFailed": 6, "RankLost": 6,
    "FormatError": 7, "TrainingDiverged": 8,
}  # fmt: skip


def test_every_row_of_the_matrix_is_accounted_for():
    assert sorted(COVERED) == list(range(1, 39))


@pytest.mark.parametrize("row", COVERED)
def test_the_test_of_a_row_exists(row):
    path, _, name = COVERED[row].partition("::")
    tree = ast.parse((ROOT / "tests" / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"row {row}: {COVERED[row]}"


def run_command_that_raises(error: BaseException):
    @click.command()
    @output.command
    def command() -> None:
        raise error

    return CliRunner().invoke(command, [])


def test_there_are_exactly_these_classes_and_their_codes():
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
