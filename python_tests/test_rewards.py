"""Rewards: hand-computed values, hostile text, time linear in the text."""

import math
import re
import time
from fractions import Fraction
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards import (
    box_ious,
    last_block,
    parse_boxes,
    parse_letter,
    parse_span,
    parse_spans,
    scan,
    span_ious,
    span_set_iops,
    span_set_ious,
    track_ious,
    well_formed,
)
from vcr1_fast.rewards.text import parse_number


def temporal_iou(prediction, target, duration=None):
    return span_ious([prediction], [target], [duration])[0]


def interval_set_iou(prediction, target):
    return span_set_ious([prediction], [target])[0]


def interval_set_iop(prediction, target):
    return span_set_iops([prediction], [target])[0]


def box_iou(prediction, target):
    return box_ious([prediction], [target])[0]


def track_iou(prediction, target):
    return track_ious([prediction], [target])[0]


OPTIONS = ("red circle", "blue square", "green star", "a dog")


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("3.5 to 8.0", (3.5, 8.0)),
        ("12.5s to 14s", (12.5, 14.0)),
        ("12.5 seconds  to  14 sec.", (12.5, 14.0)),
        ("12.5-14", (12.5, 14.0)),
        ("12.5s \u2013 14 s", (12.5, 14.0)),
        ("3to5", (3.0, 5.0)),
        ("5. to 10.", (5.0, 10.0)),
        ("5 TO 10", (5.0, 10.0)),
        ("It lasts\nfrom 5\nuntil 10, I think", (5.0, 10.0)),
        ("between 5 and 10", (5.0, 10.0)),
        ("-3 to 5", (-3.0, 5.0)),
        ("0:05 to 1:05.5", (5.0, 65.5)),
        ("1:00:00 to 1:00:01", (3600.0, 3601.0)),
        ("he eats 2 apples from 3 to 5", (3.0, 5.0)),
        ("1e1 to 12", (10.0, 12.0)),
        ("4 to 4", (4.0, 4.0)),
        ("5 to 10 to 20", None),
        ("3 to 5 and 7 to 9", None),
        ("3-5, 7-9", None),
        ("8 to 3", None),
        ("1,5 to 2,5", None),
        ("0:75 to 1:80", None),
        ("1e999 to 5", None),
        ("5 to 1e999", None),
        ("nan to 5", None),
        ("inf to inf", None),
        ("9" * 400 + " to 5", None),
        ("\u0663 to \u0665", None),
        ("[EVENT]", None),
        ("5", None),
        ("", None),
    ],
)
def test_parse_span(text, span):
    assert parse_span(text) == span


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("[(1.0, 4.5)]", ((1.0, 4.5),)),
        (" [ ( 1 ,2 ),[3., .5e1] , ] ", ((1.0, 2.0), (3.0, 5.0))),
        ("[(1,2)" + ",(1,2)" * 15 + "]", ((1.0, 2.0),) * 16),
        ("[(1,2)" + ",(1,2)" * 16 + "]", None),
        ("[]", None),
        ("[(3, 2)]", None),
        ("(1, 2)", None),
        ("[(1, 2, 3)]", None),
        ("[(1, 1e999)]", None),
        ("[(1, nan)]", None),
        ("[(1, 2)] [(3, 4)]", None),
        ("__import__('os')", None),
    ],
)
def test_parse_spans(text, spans):
    assert parse_spans(text) == spans


def test_parse_boxes():
    assert parse_boxes("[[0.1, 0.2, 0.3, 0.4], (0, 0, 1, 1)]", 2) == (
        (0.1, 0.2, 0.3, 0.4),
        (0.0, 0.0, 1.0, 1.0),
    )
    assert parse_boxes("[\n[0.1, 0.2, 0.3, 0.4],\n]", 1) == ((0.1, 0.2, 0.3, 0.4),)
    assert parse_boxes("[[0.1, 0.2, 0.3, 0.4]]", 2) is None
    assert parse_boxes("[[0.1, 0.2, 0.3]]", 1) is None
    assert parse_boxes("[[0.1, 0.2, 0.3, 1e999]]", 1) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        (" (b) ", "B"),
        ("B.", "B"),
        ("B. blue square", "B"),
        ("**Answer: C**", "C"),
        ("Best answer: C", "C"),
        ("The correct option is (D).", "D"),
        ("Because B", "B"),
        ("blue square", "B"),
        ("A red circle", "A"),
        ("A dog", "D"),
        ("A blue dog", None),
        ("the answer is a blue dog", None),
        ("Apple", None),
        ("B and C", None),
        ("(A) or (B)", None),
        ("A. B. C. D.", None),
        ("A or B", None),
        ("Answer: B or C", None),
        ("The answer is (A) and (B)", None),
        ("A) B)", None),
        ("B. B.", "B"),
        ("B. A dog is no star", "B"),
        ("D. Both of A and B", "D"),
        ("B: options A and C are wrong", "B"),
        ("The answer, I think, is B", "B"),
        ("E", None),
        ("Answer: E", None),
        ("", None),
    ],
)
def test_parse_letter(text, letter):
    assert parse_letter(text, OPTIONS) == letter


def test_parse_letter_without_options_knows_all_letters_that_stand_alone():
    assert [parse_letter(text) for text in ("H", "I", "(j)", "Z.")] == ["H", "I", "J", "Z"]
    assert [parse_letter(text) for text in ("K. red", "Answer: K")] == ["K", "K"]
    assert parse_letter("I choose B") == "B"
    assert parse_letter("the answer I choose is B") == "B"
    assert parse_letter("as Planck wrote, E equals h f") == "E"
    assert parse_letter("the mark of Z was there") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("\u22125", -5.0),
        ("it is \u22121.5 degrees", -1.5),
        ("\u20135", -5.0),
        ("-5", -5.0),
        ("from \u20135", 5.0),
        ("3\u22125", None),
        ("3\u20135", None),
    ],
)
def test_minus_signs_of_print(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("completion", "tags", "well"),
    [
        ("<answer>x</answer>", ("answer",), True),
        ("  <answer>x</answer>\n", ("answer",), True),
        ("<answer>x</answer>.", ("answer",), False),
        ("<answer> </answer>", ("answer",), False),
        ("<answer>x", ("answer",), False),
        ("<answer>x</answer><answer>y</answer>", ("answer",), False),
        ("<answer><answer>x</answer></answer>", ("answer",), False),
        ("<think>t</think>\n<answer>x</answer>", ("think", "answer"), True),
        ("<think>t</think>\n<answer>x</answer>", ("answer",), False),
        ("<answer>x</answer>", ("think", "answer"), False),
        ("<think></think><answer>x</answer>", ("think", "answer"), False),
        ("<think>t</think>so<answer>x</answer>", ("think", "answer"), False),
        ("<think>a</think></think><answer>x</answer>", ("think", "answer"), False),
        ("<answer>x</answer> <glue>y</glue>", ("answer", "glue"), True),
        ("<glue>y</glue><answer>x</answer>", ("answer", "glue"), False),
        ("", (), True),
    ],
)
def test_well_formed(completion, tags, well):
    assert well_formed(completion, tags) is well


def test_last_block_is_the_answer_not_the_reasoning():
    assert last_block("<answer>1</answer><answer>2</answer>", "answer") == "2"
    assert last_block("<think><answer>1</answer></think>", "answer") is None
    assert last_block("<think>I write <answer></think><answer>2</answer>", "answer") == "2"
    assert last_block("<think>open<answer>2</answer>", "answer") == "2"
    assert last_block("<answer><answer>2</answer></answer>", "answer") == "2"
    assert last_block("<answer>2", "answer") is None
    assert last_block("<think>why</think>", "think") == "why"


def test_temporal_iou():
    assert temporal_iou((2, 6), (4, 8)) == pytest.approx(2 / 6)
    assert temporal_iou((0, 1), (5, 6)) == 0.0
    assert temporal_iou((6, 2), (2, 6)) == 0.0
    assert temporal_iou((3, 3), (3, 3)) == 0.0
    assert temporal_iou((2, 99), (2, 10), duration=10) == 1.0
    # An annotation past the end of the clip does not cap a right answer.
    assert temporal_iou((5, 10), (5, 12), duration=10) == 1.0
    assert temporal_iou((-3, 5), (0, 5)) == 1.0
    assert temporal_iou((math.nan, 5), (0, 5)) == 0.0
    assert temporal_iou((0, math.inf), (0, 5)) == 0.0


def test_interval_sets_are_unions():
    # Predicted [1,4] (its parts overlap) and [6,7]; target [3,6.5]: 1.5 common, 6 in the union.
    prediction, target = [(6, 7), (1, 3), (2, 4)], [(3, 5), (5, 6.5)]
    assert interval_set_iou(prediction, target) == pytest.approx(1.5 / 6.0)
    assert interval_set_iop(prediction, target) == pytest.approx(1.5 / 4.0)
    assert interval_set_iou([(0, 5)] * 3, [(0, 5)]) == 1.0
    assert interval_set_iou([], []) == 0.0
    assert interval_set_iop([], target) == 0.0


def test_box_iou():
    assert box_iou((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75)) == pytest.approx(1 / 7)
    assert box_iou((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)) == 1.0
    for bad in [
        (0.5, 0.5, 0.0, 0.0),
        (0.1, 0.1, 0.1, 0.5),
        (-0.1, 0.0, 0.5, 0.5),
        (0.0, 0.0, 0.5, 1.1),
        (0.0, 0.0, math.nan, 0.5),
        (0.0, 0.0, math.inf, 0.5),
    ]:
        assert box_iou(bad, (0.0, 0.0, 0.5, 0.5)) == 0.0
        assert box_iou(bad, bad) == 0.0


def test_track_iou_counts_a_bad_box_as_a_miss_of_that_box():
    target = [(0.0, 0.0, 0.5, 0.5)] * 4
    assert track_iou(target, target) == 1.0
    assert track_iou([*target[:3], (0.5, 0.5, 0.0, 0.0)], target) == 0.75
    assert track_iou(target[:3], target) == 0.0
    assert track_iou([], []) == 0.0


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.tuples(numbers, numbers), st.tuples(numbers, numbers), st.none() | st.floats(0, 1e6))
def test_temporal_iou_is_a_ratio(prediction, target, duration):
    assert 0.0 <= temporal_iou(prediction, target, duration) <= 1.0
    assert temporal_iou(prediction, target, duration) == temporal_iou(target, prediction, duration)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20))), st.integers(1, 20))
def test_interval_set_iou_counts_whole_seconds(spans, end):
    """On whole seconds the measure is a count of unit cells."""
    cells = {cell for a, b in spans for cell in range(a, b)}
    target = set(range(end))
    expected = len(cells & target) / len(cells | target)
    assert interval_set_iou(spans, [(0, end)]) == pytest.approx(expected)


TAGS = "<think> </think> <answer> </answer> <glue> </glue> 3.5 - : (1,2) [ ] , 1e999 nan A ."
pieces = st.sampled_from([*TAGS.split(), " to ", "Answer: ", "\n", "\u0663", "\x00", "9" * 50])


@settings(max_examples=300)
@given(st.lists(pieces | st.text(max_size=8), max_size=30).map("".join))
def test_parsers_never_raise(text):
    span, spans, boxes = parse_span(text), parse_spans(text), parse_boxes(text, 2)
    for start, end in ([span] if span else []) + list(spans or ()):
        assert math.isfinite(start) and start <= end
        assert math.isfinite(end)
    assert boxes is None or all(math.isfinite(v) for box in boxes for v in box)
    assert parse_letter(text, OPTIONS) in {None, *"ABCD"}
    for tag in ("think", "answer", "glue"):
        assert last_block(text, tag) is None or last_block(text, tag) in text
    assert well_formed(text, ("answer",)) in {True, False}


HOSTILE = [
    "<think>",
    "<answer>",
    "</answer>",
    "<think></think>",
    "<answer><glue>",
    "<answer>1 to 2</answer>",
    " ",
    "[",
    "[(",
    "(1, 2), ",
    "[0, 0, 1, 1], ",
    "9",
    "1.",
    "1:",
    "1 to ",
    "1 - ",
    "A ",
    "answer: ",
    "answer is A ",
    "a-",
]


def _seconds(text):
    started = time.thread_time()
    parse_span(text)
    parse_spans(f"[{text}]")
    parse_boxes(f"[{text}]", 8)
    parse_letter(text, OPTIONS)
    last_block(text, "answer")
    well_formed(text, ("think", "answer"))
    return time.thread_time() - started


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear_in_hostile_text(piece):
    """100 kB takes well under a second; a quadratic parser takes minutes."""
    text = piece * (100_000 // len(piece))
    assert any(_seconds(text) < 1.0 for _ in range(3))  # the collector may walk in one of them


# --- batches


def exact_interval_set_iou(prediction, target, duration):
    """In rational numbers, by the cells between all borders."""
    end = max((e for spans in (prediction, target) for _, e in spans), default=0)
    end = end if duration is None else min(end, Fraction(duration))
    borders = {Fraction(x) for spans in (prediction, target) for span in spans for x in span}
    cuts = sorted(x for x in borders | {Fraction(0), end} if 0 <= x <= end)
    common = union = Fraction(0)
    for low, high in pairwise(cuts):
        inside = [any(s <= low and high <= e for s, e in one) for one in (prediction, target)]
        common += (high - low) * all(inside)
        union += (high - low) * any(inside)
    return common / union if union else Fraction(0)


tenths = st.integers(-20, 300).map(lambda n: n / 10)
span = st.tuples(tenths, tenths)
sets = st.lists(span, max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.none() | sets, sets, st.none() | st.floats(1, 20)), max_size=12))
def test_a_batch_of_span_sets_is_each_set_alone(cases):
    predictions, targets, durations = ([case[i] for case in cases] for i in range(3))
    got = span_set_ious(predictions, targets, durations)
    alone = [span_set_ious([p], [t], [d])[0] for p, t, d in cases]
    assert got == alone
    for value, (p, t, d) in zip(got, cases, strict=True):
        assert value == pytest.approx(float(exact_interval_set_iou(p or [], t, d)), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.none() | span, span, st.none() | st.floats(1, 20)), max_size=12))
def test_a_batch_of_spans_is_each_span_alone(cases):
    predictions, targets, durations = ([case[i] for case in cases] for i in range(3))
    got = span_ious(predictions, targets, durations)
    for value, (p, t, d) in zip(got, cases, strict=True):
        assert [value] == span_ious([p], [t], [d])
        exact = exact_interval_set_iou([p] if p else [], [t], d)
        assert value == pytest.approx(float(exact), abs=1e-12)


corner = st.integers(-1, 11).map(lambda n: n / 10)
box = st.tuples(corner, corner, corner, corner)


def plain_box_iou(a, b):
    """The formula in the order in which the recorded rewards were computed."""
    for x0, y0, x1, y1 in (a, b):
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            return 0.0
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return common / (areas - common)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(box, box), max_size=9).map(lambda pairs: list(zip(*pairs, strict=True)))
    )
)
def test_tracks_of_several_lengths_have_the_bits_of_a_correctly_rounded_mean(pairs):
    tracks = [one or [(), ()] for one in pairs]
    got = track_ious([p for p, _ in tracks], [t for _, t in tracks])
    expected = [math.fsum(map(plain_box_iou, p, t)) / len(t) if t else 0.0 for p, t in tracks]
    assert got == expected
    boxes = [pair for p, t in tracks for pair in zip(p, t, strict=True)]
    assert box_ious([p for p, _ in boxes], [t for _, t in boxes]) == [
        plain_box_iou(*pair) for pair in boxes
    ]


def test_predictions_that_are_missing_or_of_another_length_score_zero():
    whole = (0.0, 0.0, 1.0, 1.0)
    assert track_ious([None, [whole], [whole] * 3], [[whole] * 2] * 3) == [0.0] * 3
    assert box_ious([None, whole], [whole] * 2) == [0.0, 1.0]
    assert span_ious([None, (0, 1)], [(0, 1)] * 2) == [0.0, 1.0]
    assert span_set_ious([None, [], [(0, 1)]], [[(0, 1)]] * 3) == [0.0, 0.0, 1.0]
    assert [f([], []) for f in (track_ious, box_ious, span_ious, span_set_ious)] == [[]] * 4
    with pytest.raises(ValueError, match=r"expected 2 numbers, got \[1, 2, 3\]"):
        span_ious([(0, 1), (0, 1)], [(1, 2, 3), (1,)])


def test_one_scan_finds_blocks_of_any_tags():
    found = scan("<think>a <way>up</way></think> <way>left</way> <glue>x</glue>", ("way", "glue"))
    assert found.blocks == {"think": "a <way>up</way>", "way": "left", "glue": "x"}
    assert found.sequence is None  # a tag inside the reasoning
    assert scan("<way>left</way>", ("way",)).sequence == ("way",)
    assert scan("<think>a</think>\n<way>b</way> ", ("way",)).sequence == ("think", "way")
    assert scan("<way>left</way>", ("answer",)) == ({}, None)
    assert scan(" ", ("way",)) == ({}, ())


def old_last_block(completion, tag):
    """The scan for one tag, as it was before all tags were found in one."""
    found, opened, thinking = None, None, False
    closing_think = completion.rfind("</think>")
    for match in re.finditer(r"<(/?)(think|answer|glue)>", completion):
        closes, name = match.groups()
        if name == "think" and tag != "think":
            thinking = not closes and match.start() < closing_think
            opened = None
        elif name == tag and not thinking:
            if not closes:
                opened = match.end()
            elif opened is not None:
                found, opened = completion[opened : match.start()], None
    return found


tags = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>"])


@settings(max_examples=500)
@given(st.lists(tags | st.sampled_from(["x", " ", "\n", "y"]), max_size=14).map("".join))
def test_one_scan_finds_what_a_scan_for_each_tag_does(text):
    found = scan(text, ("answer", "glue"))
    # A </think> that nothing opens closes what the chat template opened in the prompt.
    first = re.search("</?think>", text)
    if first and first[0] == "</think>":
        text = "<think>" + text
    for tag in ("think", "answer", "glue"):
        assert found.blocks.get(tag) == old_last_block(text, tag)
    for order in permutations(("think", "answer", "glue")):
        for names in (order[:1], order[:2], order):
            blocks = "".join(rf"\s*<{tag}>([^<]*[^<\s][^<]*)</{tag}>" for tag in names)
            assert (found.sequence == names) == bool(re.fullmatch(rf"{blocks}\s*", text))
