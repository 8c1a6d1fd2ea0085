"""Sums of two numbers below a thousand, asked in plain words: one of the tasks of the bundled model.

Owns the phrasing. The source of a sum is its two numbers in order of size, so that neither 12 + 30 nor
30 + 12, in either language, stands on both sides of the split.
"""

from __future__ import annotations

from random import Random

__all__ = ["chinese", "english"]

_EN_PROMPTS = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "{a} + {b} = ?",
    "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
    "There are {a} {things} in one box and {b} in another. How many {things} in total?",
    "A shop sold {a} {things} on Monday and {b} on Tuesday. How many in all?",
)
_ZH_PROMPTS = (
    "{a} + {b} 等于多少？",
    "{a}加{b}等于几？",
    "请计算：{a} + {b}",
    "{a} + {b} = ？",
    "{a}与{b}的和是多少？",
    "算一算{a}加上{b}是多少。",
    "{name}有{a}个{things}，又得到{b}个，现在一共有多少个{things}？",
    "一个箱子里有{a}个{things}，另一个里有{b}个，一共有多少个？",
    "商店星期一卖了{a}个{things}，星期二卖了{b}个，总共卖了多少个？",
)
_EN_NAMES = ("Anna", "Tom", "Lucy", "Peter", "Maria", "Jack")
_EN_THINGS = ("apples", "books", "stamps", "marbles", "tickets", "coins")
_ZH_NAMES = ("小明", "小红", "李雷", "王芳", "张伟", "小华")
_ZH_THINGS = ("苹果", "气球", "球", "贝壳", "橘子", "杯子")


def _numbers(rng: Random) -> tuple[int, int]:
    if rng.random() < 0.6:
        return rng.randint(10, 99), rng.randint(10, 99)
    return rng.randint(10, 999), rng.randint(100, 999)


def _row(
    rng: Random, prompts: tuple[str, ...], names: tuple[str, ...], things: tuple[str, ...]
) -> tuple[str, str, str]:
    pair = _numbers(rng)
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    prompt = rng.choice(prompts).format(a=a, b=b, name=rng.choice(names), things=rng.choice(things))
    return f"{min(pair)}+{max(pair)}", prompt, str(a + b)


def english(rng: Random) -> tuple[str, str, str]:
    """One sum in English: (numbers in order of size, prompt, sum).

    >>> source, prompt, answer = english(Random(0))
    >>> sum(map(int, source.split("+"))) == int(answer)
    True
    """
    return _row(rng, _EN_PROMPTS, _EN_NAMES, _EN_THINGS)


def chinese(rng: Random) -> tuple[str, str, str]:
    """One sum in Chinese: (numbers in order of size, prompt, sum).

    >>> source, prompt, answer = chinese(Random(0))
    >>> sum(map(int, source.split("+"))) == int(answer)
    True
    """
    return _row(rng, _ZH_PROMPTS, _ZH_NAMES, _ZH_THINGS)
