"""What a launcher's environment says about a worker."""

from __future__ import annotations

import pytest

from actstore.errors import UsageError
from actstore.request import worker_of

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}  # what a batch script has, without srun


@pytest.mark.parametrize(
    "environment, said",
    [
        ({}, (1, 0, "")),
        (BATCH, (1, 0, "")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (2, 1, "RANK")),
        ({"RANK": "1", "WORLD_SIZE": "2", **ARRAY}, (2, 1, "RANK")),  # torchrun inside an array
        ({"RANK": "", "WORLD_SIZE": ""}, (1, 0, "")),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"}, (8, 5, "SLURM_PROCID")),
        ({**ARRAY, **BATCH}, (4, 2, "SLURM_ARRAY_TASK_ID")),
        ({**ARRAY, "SLURM_PROCID": "1", "SLURM_NTASKS": "3"}, (12, 7, "SLURM_ARRAY_TASK_ID and SLURM_PROCID")),
        (
            {"SLURM_ARRAY_TASK_ID": "90", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"},
            (4, 2, "SLURM_ARRAY_TASK_ID"),
        ),
    ],
)
def test_the_variables_of_each_launcher(environment, said):
    assert worker_of(environment) == said


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS"])
def test_a_variable_that_is_no_number_is_named(name):
    with pytest.raises(UsageError, match=name):
        worker_of({name: "two"})


def test_a_rank_without_a_world_size_is_refused_with_what_to_set(toy_request):
    workers, rank, _ = worker_of({"RANK": "1"})
    with pytest.raises(UsageError, match="WORLD_SIZE=N RANK=i"):
        toy_request(workers=workers, rank=rank)
