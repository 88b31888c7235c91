"""Numbers and truth values in words, and text scores against rouge-score and jiwer."""

# ruff: noqa: E501, RUF001, SIM905 - tables with many phrasings a line; full-width letters and signs of other scripts are part of the tables.

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards.text import (
    parse_boolean,
    parse_number,
    rouge,
    without_emphasis,
    word_accuracy,
    words_of,
    written_units,
)

# fmt: off
NUMBERS = {
    12.0: ["12", "12.", "12.0", "+12", " 12 ", "１２", "12 people", "there are 12 dogs", "The answer is 12.", "about 12", "~12", "exactly 12", "$12", "€12", "12 kg", "1.2e1", "24/2", "twelve", "Twelve.", "twelve dogs", "there are twelve", "a total of 12", "12个", "共12个", "12人", "12-year-old", "1 dozen"],
    1234.5: ["1,234.5", "1234.5", "$1,234.50", "１,234.5"],
    1200.0: ["1,200", "1200", "1.2k", "1.2 thousand", "twelve hundred", "one thousand two hundred", "1,200 m"],
    1234567.0: ["1,234,567", "1234567", "1.234567e6", "1.234567 million"],
    -5.0: ["-5", "−5", "–5", "minus 5", "negative 5", "minus five", "negative five", "负5", "it is −5 degrees"],
    0.75: ["3/4", "0.75", ".75", "75 %", "75%", "75 percent", "75 per cent", "3 / 4"],
    21.0: ["twenty-one", "twenty one", "Twenty-one dogs.", "21"],
    105.0: ["one hundred and five", "one hundred five", "105"],
    5e6: ["5 million", "five million", "5,000,000", "500万"],
    0.0: ["0", "zero", "-0", "0.0", "0 dogs"],
    1.234: ["1.234"],
    60.0: ["5 dozen", "sixty"],
    None: [
        "", "none", "many", "-", ".", "a dozen", "half", "one half", "two thirds", "1.234,5", "1.234.567", "1,5", "12,34", "12,34,567", "0,500", "1,2345",
        "3 or 4", "3-4", "3 to 4", "3, 4", "3 and 4", "two or three", "two, three", "one two three", "2 dogs and three cats", "two dogs and 3 cats", "1 1/2", "1/2/3", "5/0",
        "not 5", "it isn't 5", "不是5", "no 5", "more than 5", "less than 5", "at least 5", "at most 5", "over 5", "under 5", "up to 5", "no more than 5", ">5", "< 5", "≥5", "超过5", "至少5个",
        "5+", "5 or more", "5 or fewer", "5 degrees below zero", "零下5度", "3½", "½", "3²", "10³", "1.5 x 10^3", "1.5×10³", "2*3", "5_000", "1'000", "0x10",
        "H2O", "x2", "v3", "٣", "3٣", "1:30", "1e999", "nan", "inf", "twenty percent", "one of them", "9" * 100, "the answer is 5, not 6", "minus -5",
    ],
}
BOOLEANS = {
    True: ["yes", "Yes.", "YES", "true", "Yes, it is red.", "yes, the dog runs", "是", "是的", "对", "はい", "네"],
    False: ["no", "No.", "false", "No, it is blue.", "No dogs are seen.", "no, it is not", "不是", "否", "不", "没有", "いいえ", "아니요"],
    None: ["", "maybe", "it is true", "no, yes", "yes and no", "true or false", "no doubt", "No doubt, it is red", "no problem", "yes, it is not true", "not true", "Yes, that is not false", "是不是", "nope"],
}
# fmt: on


def rows(table):
    return [(text, value) for value, texts in table.items() for text in texts]


@pytest.mark.parametrize(("text", "number"), rows(NUMBERS))
def test_number(text, number):
    assert parse_number(text) == (number if number is None else pytest.approx(number, rel=1e-12))


@pytest.mark.parametrize(("text", "value"), rows(BOOLEANS))
def test_boolean(text, value):
    assert parse_boolean(text) is value


ALPHABET = [
    *"0123456789.,-+/%eE k", "twelve", "hundred", "and", "minus", "not", "½", "²", "万", "千", "\u0663",
    "１", "yes", "no", "true", " ", "x",
]  # fmt: skip


@settings(max_examples=500)
@given(st.lists(st.sampled_from(ALPHABET) | st.text(max_size=3), max_size=16).map("".join))
def test_any_text_is_read_without_an_exception(text):
    parse_boolean(text)
    number = parse_number(text)
    assert number is None or abs(number) < float("inf")
    assert 0.0 <= rouge(text, "a b") <= 1.0
    assert 0.0 <= word_accuracy(text, "a b") <= 1.0
    if words_of(text):
        assert rouge(text, text) == 1.0
    assert word_accuracy(text, text) == 1.0


# (prediction, target, F1 of ROUGE-1, ROUGE-2, ROUGE-L), computed by rouge-score 0.1.2, no stemmer.
ROUGE = [
    ("the man pours water", "a man pours the water into a glass", 2 / 3, 0.2, 0.5),
    ("the cat sat on the mat", "the cat is on the mat", 5 / 6, 0.6, 5 / 6),
    ("red car", "car red", 1.0, 0.0, 0.5),
    ("a dog runs", "the dog ran fast", 2 / 7, 0.0, 2 / 7),
    ("it's 3.5 m", "its 3 5 m", 2 / 3, 4 / 7, 2 / 3),
    ("one two three four", "four three two one", 1.0, 0.0, 0.25),
    ("cat", "the cat", 2 / 3, 0.0, 2 / 3),
    ("snake_case", "snake case", 1.0, 1.0, 1.0),
]


@pytest.mark.parametrize(("prediction", "target", "one", "two", "longest"), ROUGE)
def test_rouge_is_the_mean_of_the_packages_three(prediction, target, one, two, longest):
    assert rouge(prediction, target) == pytest.approx((one + two + longest) / 3)


@pytest.mark.parametrize(
    ("prediction", "target", "value"),
    [
        ("cat", "dog", 0.0),
        ("yes", "no", 0.0),
        ("", "dog", 0.0),
        ("dog", "", 0.0),
        ("", "", 0.0),
        ("!!!", "!!!", 0.0),
        ("cat", "cat", 1.0),
        ("Cat.", "cat", 1.0),
        # Characters are the units: 3 of 4 shared, 2 of 3 pairs, 3 in order.
        ("狗在跑步", "狗在跑", (6 / 7 + 4 / 5 + 6 / 7) / 3),
        ("猫", "狗", 0.0),
        ("หมา", "หมา", 1.0),
        ("é", "e\u0301", 1.0),
    ],
)
def test_rouge_of_few_words_and_other_scripts(prediction, target, value):
    assert rouge(prediction, target) == pytest.approx(value)


# (prediction, target, max(0, 1 - error rate)), computed by jiwer 4.0.0: wer, or cer without spaces.
WORD_ACCURACY = [
    ("no entry", "no entry", 1.0),
    ("entry", "no entry", 0.5),
    ("no no entry", "no entry", 0.5),
    ("stop here now", "stop there now", 2 / 3),
    ("c++ rocks", "c# rocks", 0.5),
    ("price $5", "price €5", 0.5),
    ("10% off today", "10 off today", 2 / 3),
    ("a b c d e", "b c d e", 0.75),
    ("one two three four", "one entry", 0.0),
    ("禁止入内", "禁止入内", 1.0),
    ("禁止人内", "禁止入内", 0.75),
    ("止入", "禁止入内", 0.5),
    ("小心地滑", "小心路滑", 0.75),
    ("ห้ามเข้า", "ห้ามเข้ส", 0.875),
]


@pytest.mark.parametrize(("prediction", "target", "value"), WORD_ACCURACY)
def test_word_accuracy_is_that_of_the_package(prediction, target, value):
    assert word_accuracy(prediction, target) == pytest.approx(value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *[("-5", "5"), ("C++", "C#"), ("$5", "€5"), ("10%", "10"), ("!!!", "?"), ("1.5", "1,5")],
        *[("→", "←"), ("a@b.c", "a b c"), ("+3", "-3"), (".5", "5"), ("#1", "1"), ("→", "")],
    ],
)
def test_symbols_count_in_what_is_read_off_a_sign(one, other):
    assert word_accuracy(one, other) < 1
    assert word_accuracy(other, one) < 1
    assert word_accuracy(one, one) == 1


@pytest.mark.parametrize(
    "text", ["no entry!", "“No entry.”", "(no entry)", "NO  ENTRY", "ｎｏ ｅｎｔｒｙ", "no entry,"]
)
def test_case_width_and_sentence_punctuation_do_not_count(text):
    assert word_accuracy(text, "No entry") == 1


def test_units():
    assert written_units("Stop, 禁止入内! $5 !!!") == ["stop", "禁", "止", "入", "内", "$5", "!!!"]
    assert words_of("It's 狗 cafe\u0301 snake_case") == ["it", "s", "狗", "café", "snake", "case"]
    assert without_emphasis("**a** b") == "a b"
    assert without_emphasis("C* x_1 2*3") == "C* x_1 2*3"


def test_agrees_with_rouge_score_on_random_text():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    chance = random.Random(0)
    letters = "abcXYZ 0189.,;:!?'\"()-_+%$#@/\n\t"
    for _ in range(2000):
        texts = ["".join(chance.choices(letters, k=chance.randint(0, 25))) for _ in range(2)]
        found = scorer.score(texts[1], texts[0])
        values = [found[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")]
        if all(len(words_of(text)) < 2 for text in texts):
            del values[1]  # no pairs on either side
        assert rouge(*texts) == pytest.approx(sum(values) / len(values)), texts


def test_agrees_with_jiwer_on_random_text():
    jiwer = pytest.importorskip("jiwer", reason="needs jiwer")
    chance = random.Random(0)
    words = "the a man red 3 1.5 it's c++ $5 10% a_b over-there -5 +3 → a@b.c €5".split()
    for _ in range(2000):
        said = " ".join(chance.choices(words, k=chance.randint(0, 8)))
        target = " ".join(chance.choices(words, k=chance.randint(1, 8)))
        expected = max(0.0, 1.0 - jiwer.wer(target, said))
        assert word_accuracy(said, target) == pytest.approx(expected), (said, target)
