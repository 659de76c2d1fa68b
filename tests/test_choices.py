"A choice of reading is declared once: command line, app and requests have exactly what its field says."

import argparse
import inspect
from dataclasses import fields

import pytest

from vitomr.cli import parser
from vitomr.reading.choices import CHOICES, USUAL, Decoding, choice_of, control_of, decoding_of, takes_choices


@pytest.mark.parametrize("command", [["transcribe", "a.png", "-o", "b.mxl"], ["evaluate", "--data", "d"]])
def test_each_field_is_a_flag_with_its_type_default_and_help(command, capsys):
    args = parser().parse_args(command)
    assert decoding_of(args) == USUAL
    given = {"int": "3", "float": "0.5", "str": "time"}
    for f in fields(Decoding):
        flag = f"--{f.name.replace('_', '-')}"
        got = getattr(parser().parse_args([*command, flag, given[f.type.__name__]]), f.name)
        assert type(got) is f.type and str(got) == given[f.type.__name__]
    with pytest.raises(SystemExit):
        parser().parse_args([command[0], "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for f in fields(Decoding):
        assert choice_of(f).help in said and f"(default: {f.default})" in said


def test_a_value_out_of_range_is_one_line_from_the_command_line(tmp_path, capsys):
    from vitomr.cli import main

    (tmp_path / "a.png").touch()
    wrong = (("--beam", "0", "from 1 to 64"), ("--shifts", "5", "from 1 to 4"), ("--top-p", "nan", "from 0 to 1"))
    for flag, value, says in wrong:
        assert main(["transcribe", str(tmp_path), "-o", str(tmp_path / "out"), flag, value]) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_a_function_of_choices_is_described_by_the_fields():
    @takes_choices("max_tokens")
    def f(x: int, **choices):
        """Do it.

        Args:
            x: a number

        Returns:
            nothing
        """
        return x, choices

    named = [n for n in CHOICES if n != "max_tokens"]
    assert list(inspect.signature(f).parameters) == ["x", *named]
    assert {n: p.default for n, p in inspect.signature(f).parameters.items() if n != "x"} == {
        n: CHOICES[n].default for n in named
    }
    assert all(f"{n}: {choice_of(CHOICES[n]).help}\n" in f.__doc__ for n in named)
    assert f(1, *range(3), shifts=4) == (1, {"beam": 0, "temperature": 1, "top_k": 2, "shifts": 4})
    with pytest.raises(TypeError):
        f(1, max_tokens=3)


def test_a_new_field_needs_no_other_change(monkeypatch):
    "Flags and controls follow the table of fields, not a list of their own."
    from vitomr.reading import choices

    monkeypatch.setitem(choices.CHOICES, "width", CHOICES["beam"])
    p = argparse.ArgumentParser()
    choices.add_flags(p)
    assert p.parse_args(["--width", "7"]).width == 7 and control_of("width")[0] == "Slider"
