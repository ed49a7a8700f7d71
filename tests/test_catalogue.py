"""Every id of the fault catalogue has tests that exist, or a written reason; what is owed is counted aloud."""

import ast
from functools import cache
from pathlib import Path

import pytest
from catalogue import CATALOGUE, NOT_YET
from test_catalogue_data import FILES, PICTURES, RECORDS

HERE = Path(__file__).parent


@cache
def functions(module: str) -> set[str]:
    """The tests that a file defines."""
    return {
        node.name
        for node in ast.parse((HERE / f"{module}.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_no_id_is_given_twice():
    """The second of a key would silently replace the first."""
    (table,) = [
        node.value for node in ast.parse((HERE / "catalogue.py").read_text()).body if isinstance(node, ast.AnnAssign)
    ]
    ids = [key.value for key in table.keys if isinstance(key, ast.Constant)]
    assert sorted(ids) == sorted(set(ids))


def test_all_are_there_and_each_has_tests_or_a_reason():
    assert sorted(CATALOGUE) == list(range(1, len(CATALOGUE) + 1)) and len(CATALOGUE) >= 184
    for number, verify_checkpoint in CATALOGUE.items():
        assert (
            verify_checkpoint.title
            and bool(verify_checkpoint.tests) != bool(verify_checkpoint.why)
            and (verify_checkpoint.why in ("", NOT_YET) or len(verify_checkpoint.why) > 60)
        ), number


def test_no_number_is_given_twice():
    """A dictionary keeps the last, and two people who add an entry each take the next number."""
    table = next(
        node.value for node in ast.parse((HERE / "catalogue.py").read_text()).body if isinstance(node, ast.AnnAssign)
    )
    numbers = [
        key.value for node in ast.walk(table) if isinstance(node, ast.Dict) for key in node.keys if key is not None
    ]
    assert len(numbers) == len(set(numbers)) == len(CATALOGUE), sorted({n for n in numbers if numbers.count(n) > 1})


@pytest.mark.parametrize("number", [n for n, verify_checkpoint in CATALOGUE.items() if verify_checkpoint.tests])
def test_the_tests_exist(number):
    for name in CATALOGUE[number].tests:
        module, function = name.split("::")
        assert function in functions(module), name
        table = (
            {"test_a_record": RECORDS, "test_a_file_of_records": FILES, "test_a_picture": PICTURES}.get(function)
            if module == "test_catalogue_data"
            else None
        )
        if table and number not in (92, 125, 191):
            assert any(case.split()[0] == str(number) for case in table), f"{name} has no case of {number}"


def test_what_is_owed_is_said(record_property):
    owed = [n for n, verify_checkpoint in CATALOGUE.items() if verify_checkpoint.why == NOT_YET]
    reasons = [n for n, verify_checkpoint in CATALOGUE.items() if verify_checkpoint.why not in ("", NOT_YET)]
    record_property(
        "reached",
        f"{len(CATALOGUE)} faults: {len(CATALOGUE) - len(owed) - len(reasons)} tested, {len(reasons)} with a written reason, {len(owed)} not yet",
    )
    for n in reasons:
        record_property("reached", f"  {n:>3}  {CATALOGUE[n].title}: {CATALOGUE[n].why}")
    for n in owed:
        record_property("reached", f"  {n:>3}  {CATALOGUE[n].title}: {NOT_YET}")
    assert len(owed) + len(reasons) + sum(bool(f.tests) for f in CATALOGUE.values()) == len(CATALOGUE)
