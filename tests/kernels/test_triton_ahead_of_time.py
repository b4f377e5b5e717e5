"""Every kernel is compiled for GPUs that need not be there, in processes of their own."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}
# 32-bit registers of one multiprocessor or compute unit.
REGISTERS = {"sm_80": 2**16, "sm_90": 2**16, "sm_100": 2**16, "gfx942": 2**17}
MODULE = "elips_torch.kernels.compile_report"


def report(*options):
    # Under the interpreter nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", MODULE, *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@functools.cache
def records(target):
    done = report("--json", target)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
class TestCompiled:
    def test_nothing_spills(self, target):
        assert not [record["name"] for record in records(target) if record["spills"]]

    def test_shared_memory_suffices(self, target):
        assert not [r["name"] for r in records(target) if r["shared_bytes"] > SHARED_KIB[target] * 1024]

    def test_registers_suffice_for_a_program(self, target):
        assert not [r["name"] for r in records(target) if r["registers"] * r["threads"] > REGISTERS[target]]

    def test_tensor_instructions_are_where_they_are_meant(self, target):
        for record in records(target):
            kinds = record["tensor"]
            assert bool(kinds) == bool(record["needs"]), record
            assert all(kind.startswith(record["needs"]) for kind in kinds), record
            if "int8" in record["name"]:
                assert all(re.search(r"s8|i8", kind) for kind in kinds), record

    def test_no_product_is_computed_in_tf32(self, target):
        assert not [record["name"] for record in records(target) if record["tf32"]]

    def test_little_follows_each_product(self, target):
        counted = [record for record in records(target) if record["epilogue"]]
        assert counted
        assert not [(r["name"], r["epilogue"]) for r in counted if r["epilogue"] > r["budget"]]

    def test_rows_are_found_by_addresses_of_64_bits(self, target):
        assert not [(r["name"], r["narrow_products"]) for r in records(target) if r["narrow_products"]]

    def test_rows_are_read_sixteen_bytes_at_a_time(self, target):
        assert not [r["name"] for r in records(target) if r["must_be_wide"] and not r["wide_loads"]]


def test_the_table_lists_what_there_is():
    done = report("--check")
    assert done.returncode == 0, f"{done.stderr}\nrun python -m {MODULE}"
