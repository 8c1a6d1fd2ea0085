"""Short questions over one given sentence: one of the tasks of the bundled model.

Owns the words and the grammar. A sentence says who did what to how many things, of which colour, where and
when; a question asks for one of these. The source is the sentence, so that a held-out sentence is never
learned under another question.
"""

from __future__ import annotations

from random import Random

__all__ = ["chinese", "english"]

_EN_NAMES = ("Anna", "Tom", "Lucy", "Peter", "Maria", "Jack", "Nina", "Omar", "Grace", "Leo", "Emma", "Paul")
_EN_VERBS = (
    ("bought", "buy"),
    ("found", "find"),
    ("sold", "sell"),
    ("painted", "paint"),
    ("lost", "lose"),
    ("counted", "count"),
)
_EN_COUNTS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_EN_COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "grey")
_EN_THINGS = (
    "apples",
    "hats",
    "cups",
    "chairs",
    "boxes",
    "bicycles",
    "balloons",
    "shirts",
    "candles",
    "pencils",
)
_EN_PLACES = (
    "at the market",
    "in the park",
    "at school",
    "in the kitchen",
    "at the station",
    "in the garden",
    "near the bridge",
    "in the library",
    "at the beach",
    "in the old town",
)
_EN_TIMES = (
    "on Monday",
    "on Tuesday",
    "on Friday",
    "on Sunday",
    "in June",
    "in winter",
    "last night",
    "at noon",
)
_EN_SENTENCES = (
    "{name} {verb} {count} {colour} {things} {place} {time}.",
    "{Time}, {name} {verb} {count} {colour} {things} {place}.",
    "{Place}, {name} {verb} {count} {colour} {things} {time}.",
)
_EN_QUESTIONS = {
    "name": "Who {verb} the {things}?",
    "count": "How many {things} did {name} {base}?",
    "colour": "What colour were the {things}?",
    "things": "What did {name} {base}?",
    "place": "Where did {name} {base} the {things}?",
    "time": "When did {name} {base} the {things}?",
}
_EN_PROMPTS = (
    "{text} {question}",
    "{text}\n{question}",
    "Read the sentence and answer the question. {text} {question}",
    "Sentence: {text}\nQuestion: {question}",
    "{question} {text}",
)

_ZH_NAMES = ("小明", "小红", "李雷", "王芳", "张伟", "刘洋", "陈静", "赵敏", "何平", "孙丽", "小华", "小军")
_ZH_VERBS = ("买", "找到", "卖", "画", "丢", "数")
_ZH_COUNTS = ("两", "三", "四", "五", "六", "七", "八", "九", "十")
_ZH_COLOURS = ("红色", "蓝色", "绿色", "白色", "黑色", "黄色", "棕色", "灰色")
_ZH_THINGS = ("苹果", "帽子", "杯子", "椅子", "箱子", "气球", "盘子", "钱包", "风筝", "玩具")
_ZH_PLACES = ("市场", "公园", "学校", "厨房", "车站", "花园", "桥边", "图书馆", "海边", "老城区")
_ZH_TIMES = ("星期一", "星期二", "星期五", "星期天", "六月", "冬天", "昨晚", "中午")
_ZH_SENTENCES = (
    "{name}{time}在{place}{verb}了{count}个{colour}的{things}。",
    "{time}，{name}在{place}{verb}了{count}个{colour}的{things}。",
    "在{place}，{name}{time}{verb}了{count}个{colour}的{things}。",
)
_ZH_QUESTIONS = {
    "name": "谁{verb}了{things}？",
    "count": "{name}{verb}了几个{things}？",
    "colour": "{things}是什么颜色的？",
    "things": "{name}{verb}了什么？",
    "place": "{name}在哪里{verb}了{things}？",
    "time": "{name}什么时候{verb}了{things}？",
}
_ZH_PROMPTS = (
    "{text}{question}",
    "{text}\n{question}",
    "读句子，回答问题。{text}{question}",
    "句子：{text}\n问题：{question}",
    "{question}{text}",
)


def english(rng: Random) -> tuple[str, str, str]:
    """One English sentence and a question over it: (sentence, prompt, answer).

    >>> sentence, prompt, answer = english(Random(0))
    >>> sentence in prompt and answer.lower() in sentence.lower()
    True
    """
    verb, base = rng.choice(_EN_VERBS)
    facts = {
        "name": rng.choice(_EN_NAMES),
        "count": rng.choice(_EN_COUNTS),
        "colour": rng.choice(_EN_COLOURS),
        "things": rng.choice(_EN_THINGS),
        "place": rng.choice(_EN_PLACES),
        "time": rng.choice(_EN_TIMES),
    }
    words = facts | {"verb": verb, "base": base}
    words |= {"Place": facts["place"].capitalize(), "Time": facts["time"][:1].upper() + facts["time"][1:]}
    text = rng.choice(_EN_SENTENCES).format(**words)
    asked = rng.choice(tuple(_EN_QUESTIONS))
    question = _EN_QUESTIONS[asked].format(**words)
    return text, rng.choice(_EN_PROMPTS).format(text=text, question=question), facts[asked]


def chinese(rng: Random) -> tuple[str, str, str]:
    """One Chinese sentence and a question over it: (sentence, prompt, answer).

    >>> sentence, prompt, answer = chinese(Random(0))
    >>> sentence in prompt and answer in sentence
    True
    """
    facts = {
        "name": rng.choice(_ZH_NAMES),
        "count": rng.choice(_ZH_COUNTS),
        "colour": rng.choice(_ZH_COLOURS),
        "things": rng.choice(_ZH_THINGS),
        "place": rng.choice(_ZH_PLACES),
        "time": rng.choice(_ZH_TIMES),
    }
    words = facts | {"verb": rng.choice(_ZH_VERBS)}
    text = rng.choice(_ZH_SENTENCES).format(**words)
    asked = rng.choice(tuple(_ZH_QUESTIONS))
    question = _ZH_QUESTIONS[asked].format(**words)
    return text, rng.choice(_ZH_PROMPTS).format(text=text, question=question), facts[asked]
