"""Reading answers: tables of phrasings judged by hand, and what must hold of any text.

The judgements are a careful reader's: the letter or span that the text names, None where it names
none or more than one.
"""

# ruff: noqa: E501, RUF001 - one phrasing a line; full-width letters and signs of other scripts are part of the tables.

import itertools
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcr1_fast.rewards import parse_label, parse_letter, parse_span, score
from vcr1_fast.rewards.answer import MAX_MENTIONS
from vcr1_fast.rewards.text import parse_boolean, parse_number, rouge, word_accuracy

OPTIONS = (
    "the man opens the door",
    "the man closes the window",
    "the man sits down",
    "the man leaves",
)

# fmt: off
LETTERS = {
    'A': [
        'A',
        '(A)',
        '[A]',
        'a',
        '(a)',
        'A.',
        'A)',
        'A:',
        '**A**',
        '`A`',
        'A\n',
        '\\boxed{A}',
        '$\\boxed{A}$',
        '\\boxed{\\text{A}}',
        '\\(A\\)',
        'Ａ',
        '（Ａ）',
        'Ⓐ',
        'A. the man opens the door',
        'A) the man opens the door',
        '(A) the man opens the door',
        'A: the man opens the door',
        'A - the man opens the door',
        'A the man opens the door',
        'A, the man opens the door',
        'the man opens the door',
        'The man opens the door.',
        'The answer is the man opens the door',
        'The answer is A because B is wrong',
        'The answer is A not B',
        'A is right, B is wrong',
        'A rather than B',
        'A instead of C',
        'I choose A over D',
        'A because D does not match',
        'Option A is right, option B is wrong',
        'A as B is absent',
        'A is correct',
        'A because the man opens the door',
        'The correct option is A since he opens it',
        'The answer is A.',
        'The answer is: A',
        'Answer: A',
        'answer: a',
        'The answer is (a).',
        'Final answer: A',
        '**Final Answer:** A',
        'The best answer is A',
        'My answer is A',
        'I would choose A',
        "I'll go with A",
        'Option A',
        'option a',
        'The answer is option A',
        'The correct choice is (A).',
        '选A',
        '答案是A',
        '答案：A',
        '正确答案是A。',
        '应该选A',
        '故选A',
        '因此选择A',
        '答案为（A）',
        '选项A正确',
        'A是正确的',
        'A正确，B错误',
        '不是B，是A',
        '选A不选B',
        '答案是A，不是B',
        'B是错的，选A',
        '答えはAです',
        '正解はA',
        'A が正しい',
        '정답은 A입니다',
        '정답: A',
        'not B but A',
        'It is not B, it is A',
        'B is wrong, so A',
        'B is incorrect. The answer is A',
        'Not B. A.',
        'A, not B',
        'A. Not B.',
        'A (not B)',
        'neither B nor C, so A',
        'B and C are wrong; A is right',
        'B... no, A',
        'B, no, A',
        'B. Wait, A',
        'B. Actually, A',
        'I think B. No, wait, it is A.',
        'B? No. A.',
        "Is it B? No, it's A",
        'C, sorry, A',
        'B or rather A',
        'A ✓, B ✗',
        'A ✅',
        '{"answer": "A"}',
        "{'answer': 'A'}",
        'Answer = A',
        'Answer - A',
        'A is the answer',
        'A is the best option',
        'A must be right',
        'It must be A',
        "It's A",
        'It is option A',
        'La respuesta es A',
        'Die Antwort ist A',
        'La réponse est A',
        'Ответ: A',
        'The man does this first.\nA',
        'The options are:\nA. the man opens the door\nB. the man closes the window\nC. the man sits down\nD. the man leaves\nAnswer: A',
        'Unlike B, A shows it',
        'A, since B, C and D are not seen',
        "A isn't wrong, B is wrong",
        'Maybe A',
        'I first thought B, but it is A',
        'I think it could be A',
        'We can rule out B, C and D, so the answer is A',
        'All others are wrong: A',
        'The answer is definitely A',
        'The answer must be A',
        'The answer here is A',
        'none other than A',
        'A is better than B',
        'A fits; B does not',
        'A! ',
        'A;',
        '“A”',
        '"A"',
        "'A'",
        'A (but could be B)',
        'A was right, B was not',
        'The answer is A and the man opens the door',
        'Answer: A. B, C and D are wrong.',
        'B is not the answer, A is',
        'Only A',
        'A only',
        'Say A',
        'A or B? Not B.',
        'A: yes. B: no.',
        '**A.** the man opens the door',
        'A (correct), B (wrong)',
        'B would be correct if he closed it. It is A.',
        "B can't be right; A.",
        'A! Not B!',
        '答案是A。B不符合题意。',
        'A项正确，B项错误',
        'not option B, option A',
    ],
    'B': [
        'B',
        'b',
        '(B)',
        '(b)',
        '[B]',
        '{B}',
        'B.',
        'B)',
        'b)',
        'b.',
        'B. the man closes the window',
        'b) the man closes the window',
        '(B) the man closes the window',
        '**B**',
        '**B.** the man closes the window',
        '**(B)** the man closes the window',
        '_B_',
        'B\n\nBecause he closes it.',
        '$B$',
        '\\text{B}',
        '\\boxed{B}',
        'The answer is $\\boxed{B}$.',
        '\\boxed{\\mathrm{B}}',
        '\\boxed{B. the man closes the window}',
        'Ｂ',
        '（Ｂ）',
        '𝐁',
        'Ⓑ',
        '⒝',
        'because B',
        'Because B',
        'so B',
        'Thus B',
        'B is right',
        'B is correct because A is wrong',
        'The answer is B, since A is wrong',
        'The answer is B. A is wrong.',
        'The answer is B. A shows a door.',
        'B, because C shows a sofa',
        'B because C shows a sofa',
        'B since A does not fit',
        'I pick B',
        'I select option B',
        'Choose B',
        'choosing B',
        'going with B',
        "I'd say the answer would be B",
        'the correct answer is b',
        'correct answer: b',
        'the right option is B',
        'Option (B)',
        'option b',
        'choice B',
        'Answer B',
        'Answer (B)',
        'answer is B.',
        'ANSWER: B',
        'ANSWER: b',
        'The answer, I think, is B',
        'The final answer is **B**',
        'the answer is "B"',
        "It's B, not A",
        'it is B rather than A',
        'B and not A',
        'B, not A or C',
        'B but not A',
        'not A, but B',
        'not A; B',
        'A is not right; B is',
        'A is not correct, B is correct',
        "A isn't correct. B is.",
        'A cannot be right, so B',
        "A can't be, so B",
        'A is impossible. B',
        'A fails, so B',
        'A does not fit, B does',
        'A is false, B is true',
        'A: wrong. B: correct',
        'A ✗ B ✓',
        'A ❌, B ✔',
        'A is eliminated, B remains',
        'Eliminate A and C; B is the answer',
        'Excluding A, C and D, the answer is B',
        'I reject A and choose B',
        'B over A',
        'instead of A, B',
        'Rather than A, I choose B',
        'A? No. B? Yes.',
        'Is it A? No. Is it B? Yes.',
        'A... no, B',
        'A - no, B',
        'A — no, B',
        'A, wait, B',
        'A. Hmm, B.',
        'A. Correction: B',
        'A. I mean B.',
        'A. On second thought, B.',
        'A, scratch that, B',
        'Sorry, B',
        '选B',
        '选 B',
        '选项B',
        '我选B',
        '我选择B',
        '答案是B',
        '答案是 B。',
        '答案为B',
        '答案：B',
        '答案:B',
        '答案应该是B',
        '正确答案：B',
        '正确选项是B',
        '应选B',
        '故选B。',
        '因为他关窗，所以选B',
        '不是A，是B',
        '不是A而是B',
        '不选A，选B',
        'B而不是A',
        'B，不是A',
        'B是对的',
        'B对，A错',
        'A错，B对',
        'A不对，B正确',
        'A不正确，选B',
        'A不符合，B符合',
        '排除A、C、D，选B',
        '除了A、C、D，只有B',
        'B。',
        '（B）关窗',
        'B、the man closes the window',
        '选择（B）',
        '答案是选项B',
        'A是错误的，答案是B',
        'A不对，应该是B',
        'Bです',
        '答えはB',
        '答え：B',
        '正解はBです',
        'AではなくB',
        'Aは間違い、Bが正しい',
        '정답은 B',
        'B가 정답',
        'B입니다',
        'A가 아니라 B',
        '답: B',
        'no es A, es B',
        'nicht A, sondern B',
        'pas A, mais B',
        'не A, а B',
        'la opción B',
        'ответ B',
        'Réponse : B',
        'Antwort: B',
        'B: options A and C are wrong',
        'B. A dog is no star',
        'B. A and C do not occur',
        'B; A is too early',
        'B (A is wrong)',
        'A man closes it, so B',
        'A window is closed: B',
        'A few seconds later he closes it, B',
        'I see a window, so B',
        'I believe the answer is B',
        'I believe it is B',
        'I am not sure, but B',
        "I'm not sure it is B",
        'no doubt B',
        'No doubt, it is B',
        'It is B, no doubt',
        'without doubt B',
        'Not only is A wrong, B is right',
        'B is not wrong',
        'Vitamin C is irrelevant: B',
        'team A wins, so B',
        'Person A leaves, so B',
        'the U.S.A. flag: B',
        'The Answer Is: B',
        'Answer:B',
        'answer:b',
        'ANS: answer B',
        'The answer is:\nB',
        'The answer is:\n\n(B)',
        'Reasoning: he closes it.\nB',
        '- B',
        '* B',
        '> B',
        '1. B',
        'B/',
        'B!',
        'B ?',
        'Option B.',
        'Option B: the man closes the window',
        'B. The man closes the window, as seen at 3 s.',
        'B) because he closes it',
        'The correct answer is B. The video shows a window, which rules out A and C.',
        'B) The man closes the window. A and C are not seen.',
        'Based on the video, the answer is B. Option A is incorrect because he never opens it.',
        'A: The man never opens the door. B: The man closes the window. Therefore, the answer is B.',
        'A is incorrect. B is correct. C is incorrect.',
        'Option A: wrong. Option B: right. Option C: wrong.',
        "It can't be A, since he closes it; must be B.",
        'Not A. Not C. Not D. So B.',
        'A seems likely, but the answer is B',
        "Either A or B, but I'd go with B.",
        'Although A is tempting, B is right.',
        'A was my first thought, but the answer is B.',
        'You might think A, but the answer is B',
        "The answer isn't obvious, but B",
        "Don't choose A. Choose B.",
        'A and C can be ruled out. B',
        'B and only B',
        'Correct: B. Wrong: A.',
        'Wrong: A. Correct: B.',
        'B is more likely than A',
        "A doesn't happen, B does, C doesn't, D doesn't.",
        'A: No. B: Yes. C: No. D: No.',
        '- A: incorrect\n- B: correct\n- C: incorrect',
        'A. Incorrect. B. Correct. C. Incorrect.',
        'From A, B, C, D I choose B',
        'Between A and B, B fits better',
        '选项A不正确，选项B正确',
        'A选项错误，B选项正确',
        '答案不是A而是B',
        '我认为是B',
        '肯定不选A，选B',
        '答案选B',
        '只有B',
        'the answer is b because a is wrong',
        'option a is wrong, option b is right',
        '### Answer: B',
        'Answer:\n\n**B. the man closes the window**',
        'B is the answer, not A',
        'Yes, B.',
        'No, B',
        'Perhaps A. Actually B.',
        "It isn't A but B",
        "I'd avoid A and choose B",
        'Ignoring A, the answer is B',
        'None of A, C and D happens; B does',
        'B. Not A.',
        '<b>B</b>',
        'B, final answer',
        'Final: B',
        'B\nExplanation: A shows a door and C shows a sofa.',
        '**Answer:** (B)',
        'The answer: **B**',
        'so the answer must be (B) the man closes the window, not (A) the man opens the door.',
    ],
    'C': [
        'C',
        '(C) the man sits down',
        'The answer is C (the man sits down).',
        'A and B are wrong, so C',
        'A or B is wrong, C is right',
        'neither A nor B; C',
        'not A or B, C',
        'A, B and D are incorrect. C is correct.',
        'All of A, B, D are wrong; the answer is C',
        'B... no, C',
        'B, no, C',
        'B. No. C.',
        '不是A也不是B，选C',
        'C, neither A nor B',
        'C. A, B and D are not shown',
        'If unsure, the answer is C',
        'Between A and B neither fits, the answer is C',
        'A和B都不对，选C',
        'A and B are wrong. C.',
        'Not A, B or D, but C',
    ],
    'D': [
        'D',
        '(D)',
        'D. Both of A and B',
        'D: the man leaves',
        'Answer: D (not A)',
        'D, unlike A, B and C',
        'It is D.',
    ],
    None: [
        '',
        '  ',
        '?',
        '...',
        'no',
        'not A',
        'not B',
        'It is not B',
        "it isn't B",
        'B is wrong',
        'B is not correct',
        "B isn't the answer",
        'B does not match',
        'The answer is not B',
        "The answer isn't B",
        'I would not choose B',
        'never B',
        'anything but B',
        'all but B',
        '不是B',
        '不选B',
        'B错',
        'B是错的',
        '排除B',
        '答案不是B',
        'BではないBではない',
        'Bではない',
        'B가 아니다',
        'no es B',
        'nicht B',
        'pas B',
        'не B',
        'B ✗',
        'B? No.',
        'A or B',
        'A and B',
        'A, B',
        'A/B',
        'A & B',
        'A+B',
        'A B',
        'AB',
        'A, B, C, D',
        'A B C D',
        'A. B. C. D.',
        'A) B)',
        '(A)(B)',
        '(A) or (B)',
        'both A and B',
        'either A or B',
        'A or B or C',
        'A和B',
        'A或B',
        'A、B',
        'AとB',
        'A und B',
        'A y B',
        'neither',
        'neither A nor B',
        'The answer is A or B',
        'The answer is (A) and (B)',
        'Answer: B or C',
        'A and B are both right',
        'A is right and B is right',
        'The answer is A. The answer is B.',
        'Answer: A\nAnswer: B',
        'A\nB',
        '\\boxed{A} \\boxed{B}',
        'A is correct. B is correct.',
        'A ✓ B ✓',
        'B is correct but B is wrong',
        'B is right, but that is wrong',
        'I first thought B is correct, but it is wrong',
        'If B then it rains',
        'whether B',
        'A dog',
        'A man opens it',
        'A blue dog',
        'I',
        'I think',
        'I see a man',
        'I am',
        'the answer is a blue dog',
        'the answer I think',
        'the answer is a dog',
        'Apple',
        'Because',
        'Blue',
        'E',
        'Answer: E',
        '(E)',
        'E.',
        'Z',
        'the U.S.A.',
        'Q&A',
        'C++',
        'C#',
        'B-52',
        'vitamin C',
        'plan B',
        'team A',
        'person B',
        'Person A hits person B',
        'A. the man opens the door B. the man closes the window C. the man sits down D. the man leaves',
        'A) the man opens the door\nB) the man closes the window\nC) the man sits down\nD) the man leaves',
        '(A) the man opens the door, (B) the man closes the window',
        'A: opens B: closes C: sits D: leaves',
        'A. opens\nB. closes\nC. sits\nD. leaves',
        'the man opens the door; the man closes the window',
        'B. the man opens the door',
        '(B) the man opens the door',
        'B: the man opens the door.',
        'The answer is B, the man opens the door.',
        'all of the above',
        'none of the above',
        'A-D',
        'A to D',
        'A through D',
        'the first',
        '2',
        'option',
        'answer',
        'The answer is',
        '选',
        '答案是',
        '不知道',
        'None',
        'A?B?C?D?',
        'The answer would be A if he opened the door',
        'B would be correct if he closed it',
        'B is wrong and A is wrong',
        'Wrong: A',
        'Incorrect options: A, C, D',
        'Incorrect: B',
        '错误：A',
        '错误选项是A',
        'I disagree with B',
        'The least likely is B',
        'Answer: A; B; C',
        'Answer: A. B. C.',
        'Answer: A\nB',
        'Answer: A, B',
        'The answer is A. B.',
        'A... B',
        'The answer is B, but C is also right',
        'The answer is B, though C is possible too, or D is right',
        'A happens before B',
        'After A, B happens',
        'The difference between A and B',
        'Compare A with B',
        'A is the opposite of B',
        'A? B?',
        "It's A that is wrong",
        'It could be A or B',
        'A or maybe B',
        'B is less likely',
        '选A还是B',
        '都不对',
        '没有正确选项',
        'All of them',
        'None of A, B, C, D',
        'Answer: B (the man opens the door)',
        '(A) and (B) both',
        'A, B, C and D',
        'A; B',
        'I cannot decide between A and B',
        'choose between A and B',
        'A vs B',
        'A versus B',
    ],
}

# A reader finds the letter; the parser may give up, but never reads another.
HARD_LETTERS = {
    'A': [
        'A. the man opens the door\n\nB. shows a window, which is wrong',
    ],
    'B': [
        'The answer would be A if he opened the door, but he closes the window, so B',
        'A is right at first, but he closes it: B',
        "People often choose A, but it's B",
        'A can be ruled out because B happens',
        'B is closer than A',
        'I first thought A is correct, but it is wrong. B',
        '除了B都不对',
        "It can't be anything but B",
        'I would say A, but B seems better',
    ],
}

SPANS = {
    (65, 80): [
        '65 to 80',
        '1:05 to 1:20',
        'from 1:05 to 1:20',
        '1:05-1:20',
        '1:05 - 1:20',
        '1:05–1:20',
        '1:05 — 1:20',
        '00:01:05 – 00:01:20',
        '00:01:05.0 to 00:01:20.0',
        '0:01:05 to 0:01:20',
        '65s to 80s',
        '65 s to 80 s',
        '65s-80s',
        '65-80s',
        '65 to 80 seconds',
        '65 sec to 80 sec',
        '65 sec. to 80 sec.',
        '65 secs - 80 secs.',
        '65.0s – 80.0s',
        '1m5s to 1m20s',
        '1m5s-1m20s',
        '1m 5s to 1m 20s',
        '1 min 5 s to 1 min 20 s',
        '1 min 5 sec - 1 min 20 sec',
        '1 minute 5 seconds to 1 minute 20 seconds',
        '1 minute and 5 seconds to 1 minute and 20 seconds',
        'from 1 minute and 5 seconds until 1 minute and 20 seconds',
        'between 65 and 80',
        'between 65 and 80 seconds',
        'between 1:05 and 1:20',
        'from 65 until 80',
        'from 65 till 80',
        '65 through 80',
        '65 -> 80',
        '65 → 80',
        '65~80',
        '65〜80秒',
        '65到80秒',
        '65秒到80秒',
        '从65秒到80秒',
        '65至80秒',
        '65秒至80秒',
        '65-80秒',
        '1分5秒到1分20秒',
        '从1分5秒到1分20秒',
        '1分05秒至1分20秒',
        '1分钟5秒到1分钟20秒',
        '65秒から80秒まで',
        '1分5秒から1分20秒',
        '65초에서 80초',
        '1분 5초 ~ 1분 20초',
        '６５到８０秒',
        '1：05到1：20',
        '1：05－1：20',
        '1:05～1:20',
        '65000 ms to 80000 ms',
        '65000 to 80000 ms',
        '65000ms-80000ms',
        '65000到80000毫秒',
        '00:01:05,000 --> 00:01:20,000',
        '[65, 80]',
        '(65, 80)',
        '[65.0, 80.0].',
        '[1:05, 1:20]',
        '[65s, 80s]',
        'start: 65, end: 80',
        'start=65 end=80',
        '{"start": 65, "end": 80}',
        'starts at 65 s and ends at 80 s',
        'Start time: 1:05, end time: 1:20',
        'The event lasts from 65 to 80.',
        'It happens from 65 s to 80 s in the video.',
        '65 to 80, which is 15 seconds long',
        '65 to 80 (15 s)',
        'In 2019, from 65 to 80',
        '3 men run from 65 to 80',
        'two dogs, 65 to 80',
        'from about 65 to about 80',
        'from approximately 65 s to approximately 80 s',
        '~65 to ~80',
        '65 to 80 approximately',
        't = 65 to t = 80',
        't=65s to t=80s',
        'from second 65 to second 80',
        'seconds 65 to 80',
        'from 65 to the 80 second mark',
        'not 3 to 5 but 65 to 80',
        '65 to 80, not 3 to 5',
        '65 to 80 rather than 3 to 5',
        'not from 3 to 5. From 65 to 80.',
        '65 to 80 (1:05 to 1:20)',
        '65 to 80; 65 to 80',
        '1:05 min to 1:20 min',
        '1:05 to 1:20 min',
        '1:05 to 80',
        '1m5s to 80s',
        '65s to 1m20s',
        '65 to 1:20',
        'he eats 3 to 5 apples from 65 to 80',
        '+65 to +80',
        '65. to 80.',
        '65.0 to 80.00',
        '6.5e1 to 8e1',
        '**65 to 80**',
        '`65 to 80`',
        '65\nto\n80',
        '65 TO 80',
        '65 To 80',
        'von 65 bis 80',
        'de 65 à 80 s',
        'hasta 3; 65 hasta 80',
    ],
    (5, 7.5): [
        'between 5 and 7.5 seconds',
        '5 to 7.5',
        '5 s to 7.5 s',
        '5-7.5',
        '0:05 to 0:07.5',
        '5秒到7.5秒',
        '5~7.5s',
        '5000 ms to 7.5 s',
        'from 5 to 7.5 he runs',
        '5 to 7.5 while the dog sleeps',
        '5 to 7.5, I think',
        '0:05 to 7.5',
    ],
    (300, 420): [
        '5 to 7 minutes',
        '5-7 min',
        '5 min to 7 min',
        '5 minutes to 7 minutes',
        'between 5 and 7 minutes',
        '5:00 to 7:00',
        '5到7分钟',
        '5分钟到7分钟',
        '5m to 7m',
        '5 - 7 mins',
        'minute 5 to minute 7',
        '300 s to 7 min',
        '5 min to 420 s',
        '300 seconds to 7 minutes',
    ],
    (3600, 7200): [
        '1 to 2 hours',
        '1h to 2h',
        '1 hour to 2 hours',
        '1:00:00 to 2:00:00',
        '1-2 hrs',
        '1小时到2小时',
        '1 h - 120 min',
        '60 to 120 minutes',
    ],
    (3723, 14400): [
        '1h2m3s to 4h',
        '1 h 2 min 3 s to 4 h',
        '1:02:03 to 4:00:00',
        '1小时2分3秒到4小时',
    ],
    (65.5, 80): [
        '00:01:05.5 – 00:01:20',
        '1:05.5 to 1:20',
        '1m5.5s to 1m20s',
        '00:01:05,500 to 00:01:20,000',
    ],
    (3, 5): [
        'The event occurs between 3 and 5 seconds.',
        'It starts at 3 seconds and ends at 5 seconds.',
        'It starts at 0:03 and ends at 0:05',
        'starting at 3 and ending at 5',
        'start at 3s, end at 5s',
        '[3.0s - 5.0s]',
        'The 2 dogs run from 3 to 5 seconds',
        'During 3-5s, the man sits',
        'from 3 s up to 5 s',
        'from t=3 to t=5',
        '第3秒到第5秒',
        '3~5秒之间',
        '大约3秒到5秒',
        '3 to 5: the dog runs',
        '3 to 5 — he sits',
        '3 sec → 5 sec',
        '3s-5s',
        '3 to 5',
        '3to5',
        '3 and 5',
        '3s and 5s',
        '3 -- 5',
        '3 – 5 s',
    ],
    (-3, 5): [
        '-3 to 5',
    ],
    (0, 10): [
        '0 to 10',
        '0:00 to 0:10',
        '0s-10s',
    ],
    (0, 90): [
        '0 to 1:30',
        '0 to 1.5 minutes',
        '0 to 1 min 30 s',
    ],
    (45, 90): [
        '45 to 1:30',
        '45 s to 1.5 min',
        '45s to 1m30s',
    ],
    (90, 120): [
        '1.5 to 2 minutes',
    ],
    None: [
        'a 3 to 5 year old boy',
        'aged 3 to 5',
        '3 out of 5',
        'between 3 or 5',
        'the ratio is 3:5',
        '3x5',
        '2 x 3 to 5 x 6',
        'version 3.1.2 to 3.1.5',
        'from 3 to',
        'from 3 to 5, and again from 7 to 9',
        '',
        'no idea',
        '5',
        'at 5 s',
        '5 seconds',
        '1:05',
        '1m5s',
        '1 minute and 5 seconds',
        '8 to 3',
        '8s to 3s',
        '1:20 to 1:05',
        '7 to 5 minutes',
        '3, 5, 8',
        '3 5 8',
        '3 5',
        '5 to 10 to 20',
        '5-10-20',
        '2024-05-06',
        '3 to 5 and 7 to 9',
        '3 to 5, 7 to 9',
        '3 to 5 or 7 to 9',
        '[3, 5, 8]',
        '[[3, 5]]',
        '(3, 5), (7, 9)',
        '3 to five',
        'five to seven',
        'nan to 5',
        'inf to inf',
        '1e999 to 5',
        '1,5 to 2,5',
        '1,234 to 1,300',
        '1/2 to 3/4',
        '3_5 to 8',
        '0x3 to 8',
        '3^2 to 10',
        '٣ to ٥',
        '３.５.６ to 8',
        '²3 to 5',
        '0:75 to 1:80',
        '1:2 to 1:3',
        '1:02:03:04 to 2',
        '35 to 80 frames',
        'frames 35 to 80',
        'frame 35 to frame 80',
        '35 frames to 80 frames',
        'frame 35 to 80',
        '第35帧到第80帧',
        '35帧到80帧',
        'frame35 to frame80',
        '20 to 50%',
        '20% to 50%',
        '20 % - 50 %',
        '20 to 50 percent',
        '20 percent to 50 percent',
        '3 to 5 apples',
        '3 to 5 people',
        'he eats 3 to 5 apples',
        '3 to 5 km',
        '3 km to 5 km',
        '5 kg to 7 kg',
        '3 to 5 times',
        '3到5个人',
        '3到5个',
        '3 to 5 years',
        'from year 3 to 5',
        'pages 3 to 5',
        '3 pm to 5 pm',
        "3 o'clock to 5 o'clock",
        '3点到5点',
        '$3 to $5',
        '$3 to 5',
        'not 3 to 5',
        'not from 3 to 5',
        'it is not 3 to 5',
        "isn't 3 to 5",
        'never from 3 to 5',
        '不是3到5秒',
        '3 to 5 is wrong',
        '3 to 5 is not right',
        "3 to 5 isn't right",
        'except 3 to 5',
        'outside 3 to 5',
        '1 min 30 to 2 min',
        '1 min 75 s to 3 min',
        '1.5 min 10 s to 3 min',
        '2 min to 3',
        '2 minutes to 150',
        '1 to 1:30',
        '1 to 1 min 20 s',
        'between 1 minute and 5 seconds',
        '1 h 5 to 2 h',
        '2 min 5 to 10',
        '5th to 7th',
        'v3 to v5',
        '3a to 5b',
        'H2 to O3',
        '3 s frame to 5 frame',
    ],
}
# fmt: on


def rows(table):
    return [(text, value) for value, texts in table.items() for text in texts]


def test_the_tables_are_large_enough():
    assert len(rows(LETTERS)) >= 200
    assert len(rows(SPANS)) >= 200


@pytest.mark.parametrize(("text", "letter"), rows(LETTERS))
def test_letter(text, letter):
    assert parse_letter(text, OPTIONS) == letter


@pytest.mark.parametrize(("text", "letter"), rows(HARD_LETTERS))
def test_a_hard_letter_is_never_read_as_another(text, letter):
    assert parse_letter(text, OPTIONS) in (letter, None)


@pytest.mark.parametrize(("text", "span"), rows(SPANS))
def test_span(text, span):
    assert parse_span(text) == span


_STANDING = re.compile(r"(?<![A-Za-z])[ABCD](?![A-Za-z’])")


@pytest.mark.parametrize(
    "text",
    [
        text
        for text, _ in rows(LETTERS)
        if not any(option in text.lower() for option in OPTIONS)
        and not re.search(
            r"(?<![A-Za-z'])[a-d](?![A-Za-z])|A-D|\b[A-Z]{2}|\.S\.|A dog|A [a-z]+ [a-z]+ ?", text
        )
        and not re.search("[\u2100-\u24ff\uff00-\uffef\U0001d400-\U0001d7ff]|C[+#]", text)
    ],
)
def test_letters_are_read_alike(text):
    """The reading follows the letters where they are exchanged; with "A", an article, or None."""
    letter = parse_letter(text, OPTIONS)
    for order in itertools.permutations("ABCD"):
        name = dict(zip("ABCD", order, strict=True))
        other = parse_letter(_STANDING.sub(lambda m, name=name: name[m[0]], text), OPTIONS)
        assert other == (name[letter] if letter else None) or (other is None and "A" in text)


def test_the_whole_list_of_options_earns_nothing():
    for form, join in itertools.product(
        ("{l}. {o}", "{l}) {o}", "({l}) {o}", "{l}: {o}"), (" ", "\n", ", ", "; ")
    ):
        text = join.join(form.format(l=x, o=o) for x, o in zip("ABCD", OPTIONS, strict=True))
        assert parse_letter(text, OPTIONS) is None, text
        found = score("multiple_choice", [f"<answer>{text}</answer>"], ["A"])
        assert found == {"format": [0.0], "accuracy": [0.0]}, text


@pytest.mark.parametrize("rest", ["B is wrong", "not B", "B does not match", "B shows a sofa"])
def test_the_reward_of_a_letter_with_reasons(rest):
    text = f"<answer>The answer is A because {rest}</answer>"
    found = score("multiple_choice", [text] * 2, ["A", "B"])["accuracy"]
    assert found == [1.0, 0.0]


@pytest.mark.parametrize("other", ["B", "C", "D"])
@pytest.mark.parametrize(
    "reason",
    [
        " because {} is wrong", ". {} is not shown.", ", not {}", ", since {} does not fit",
        " rather than {}", ". {} is false.", "; {} contradicts the video", " (not {})", ", unlike {}",
    ],
)  # fmt: skip
def test_reasons_after_a_letter_never_flip_it(other, reason):
    for verdict in ("The answer is A", "A", "Option A", "(A)", "I choose A", "Answer: A"):
        assert parse_letter(verdict + reason.format(other), OPTIONS) == "A"


@given(st.text(max_size=60))
def test_reasoning_before_the_answer_never_changes_it(reasoning):
    from vcr1_fast.rewards.strict import read_letter, read_span

    reasoning = reasoning.replace("<", " ")
    for opening in ("<think>", ""):
        head = f"{opening}{reasoning} the answer is C, 1 to 2</think>"
        assert read_letter(head + "<answer>B</answer>", OPTIONS) == "B"
        assert read_span(head + "<answer>3 to 5</answer>") == (3.0, 5.0)


def test_options_that_read_alike_or_hold_letters():
    assert parse_letter("yes", ("yes", "Yes.", "no")) is None
    assert parse_letter("no", ("yes", "Yes.", "no")) == "C"
    assert parse_letter("B", ("B", "A")) == "B"
    assert parse_letter("D. Both A and B", ("red", "blue", "green", "both A and B")) == "D"
    assert parse_letter("Both A and B", ("red", "blue", "green", "both A and B")) == "D"
    assert parse_letter("A. red circle", ("red", "red circle")) is None
    assert parse_letter("A. red", ("red", "red circle")) == "A"
    assert parse_letter("B. red circle", ("red", "red circle")) == "B"
    assert parse_letter("B. not a dog", ("a dog", "not a dog")) == "B"
    assert parse_letter("the answer is Red Circle.", ("red", "red circle")) == "B"


def test_an_answer_of_very_many_letters_is_unreadable():
    assert parse_letter("The answer is B. " * 3, OPTIONS) == "B"
    assert parse_letter("The answer is B. " * (MAX_MENTIONS + 1), OPTIONS) is None


ALPHABET = [
    *"ABCD", "a", "(B)", "not", "is", "wrong", "right", "or", "and", ",", ".", "\n", "no,", "because",
    "the answer is", "option", "3", "5.5", "1:05", "to", "-", "s", "min", "frames", "%", "between", "选",
    "不是", "秒", "到", "\\boxed{", "}", "**", "$", "3_5", "1/2", "½", "\x00", "é", "𝐁", "…",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(ALPHABET) | st.text(max_size=4), max_size=20), st.booleans())
def test_any_text_is_read_without_an_exception(pieces, spaced):
    text = (" " if spaced else "").join(pieces)
    assert parse_letter(text, OPTIONS) in {None, *"ABCD"}
    assert parse_letter(text) is None or parse_letter(text).isalpha()
    span = parse_span(text)
    assert span is None or span[0] <= span[1]
    parse_label(text)


@settings(max_examples=200)
@given(
    st.integers(0, 7200_000), st.integers(0, 7200_000),
    st.sampled_from([" to ", " - ", "-", "–", " until ", "到", " and "]),
)  # fmt: skip
def test_every_way_to_write_a_span_is_read_alike(a, b, joint):
    start, end = sorted((a, b))

    def clock(ms):
        return f"{ms // 3600_000}:{ms // 60_000 % 60:02d}:{ms % 60_000 / 1000:06.3f}"

    def units(ms):
        return f"{ms // 3600_000}h{ms // 60_000 % 60}m{ms % 60_000 / 1000:.3f}s"

    for write in (lambda ms: f"{ms / 1000:.3f}", lambda ms: f"{ms / 1000:.3f} s", clock, units):
        span = parse_span(write(start) + joint + write(end))
        assert span == pytest.approx((start / 1000, end / 1000)), write(start)


HOSTILE = [
    "A ", "B ", "B. ", "A or ", "not ", "it is wrong ", "answer is A ", "(a)", "no, ", "if ", "B\n", "\u201c",
    "\\boxed{", "\\text{", "$", "*", "**a** ", "_a_ ", "选B", "不是", "1s ", "1 min ", "to 1 ", "->", "~",
    "1/", "a1", "-", "1:", "9", "start", "[1,", "the ", "very ",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_is_linear_in_hostile_answers(piece):
    """100 kB takes half a second at most; a quadratic parser takes minutes."""
    text = piece * (100_000 // len(piece))

    def seconds():
        started = time.thread_time()
        parse_letter(text, OPTIONS)
        parse_span(text)
        parse_label(text)
        return time.thread_time() - started

    assert any(seconds() < 2.0 for _ in range(3))


def test_labels_keep_the_marks_that_are_theirs():
    assert parse_label("snake_case") == "snake_case"
    assert parse_label("C*") == "c*"
    assert parse_label("**High** quality.") == "high quality"
    assert parse_label('"_low_"') == "low"
    assert parse_label("`x`") == "x"


DOCS = Path(__file__).parents[1] / "docs" / "rewards.md"
_KINDS = "letter|span|number|boolean|ROUGE|word accuracy"
ROW = re.compile(rf"\| ({_KINDS}) \| `(.+?)`(?: for `(.+)`)? \| (.+) \| (.+) \| (.+) \|")
CHANGES = [m.groups() for line in DOCS.read_text().splitlines() if (m := ROW.fullmatch(line))]


def test_the_table_of_changes_is_whole():
    assert len(CHANGES) > 45
    assert all(before != now for _, _, _, before, now, _ in CHANGES)


@pytest.mark.parametrize(("kind", "text", "target", "before", "now", "why"), CHANGES)
def test_documented_changes(kind, text, target, before, now, why):
    options = ("a red circle", "a blue square", "a green star", "a dog")
    if kind == "letter":
        found = parse_letter(text, options)
    elif kind == "span":
        span = parse_span(text)
        found = span and f"{span[0]:g} to {span[1]:g} s"
    elif kind == "number":
        number = parse_number(text)
        found = None if number is None else f"{number:g}"
    elif kind == "boolean":
        found = {True: "yes", False: "no", None: None}[parse_boolean(text)]
    else:
        found = f"{(rouge if kind == 'ROUGE' else word_accuracy)(text, target):.3g}"
    assert (found or "-") == now
