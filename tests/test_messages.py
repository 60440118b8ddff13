"""Messages: one printable line that fits a screen."""

import pytest

from stripe import messages
from stripe.messages import one_line, printable, shortened

HOSTILE = ["\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\r", "\u202e", "\u2066", "\u2028", "\x7f", "\x00", "\udc80"]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_terminals_obey_is_shown_instead(text):
    shown = printable(f"a{text}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.encode("utf-8")


def test_text_that_people_write_stays():
    text = "Grüße, 猫, café №5 🙂\n\tx"
    assert printable(text) == text


def test_a_message_is_one_line_of_bounded_length():
    shown = one_line(ValueError("layer\n  " + "x" * 1_000_000 + "\n: name another"), messages.SCREEN)
    assert len(shown) == messages.SCREEN
    assert shown.startswith("layer xxx")
    assert shown.endswith("x : name another")


def test_an_error_without_words_gives_its_type():
    assert one_line(TimeoutError()) == "TimeoutError"
    assert one_line(ValueError(" \n")) == "ValueError"


def test_errors_of_files_name_the_file_and_no_number():
    with pytest.raises(FileNotFoundError) as missing:
        open("no/such/file")
    assert one_line(missing.value) == "No such file or directory: 'no/such/file'"
    assert one_line(OSError(28, "run 'a' could not be written")) == "run 'a' could not be written"


@pytest.mark.parametrize("length", [9, 10, 11, 500])
def test_shortened_keeps_both_ends(length):
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    short = shortened(text, 10)
    assert len(short) <= 10
    assert (short == text) == (length <= 10)
    assert text.startswith(short[:2])
    assert text.endswith(short[-3:])
