"""Short sentences and their translation, English to Chinese and back: a task of the bundled model.

Owns a grammar of some sixty words whose sentences have exactly one translation in each direction. The source
of both directions is the English sentence, so that no sentence is learned in one direction and asked in the
other.
"""

from __future__ import annotations

from random import Random

__all__ = ["chinese", "english"]

_SUBJECTS = (
    ("the boy", "那个男孩"),
    ("the girl", "那个女孩"),
    ("the teacher", "那位老师"),
    ("the doctor", "那位医生"),
    ("my mother", "我妈妈"),
    ("my father", "我爸爸"),
    ("my friend", "我朋友"),
    ("his sister", "他姐姐"),
    ("her brother", "她哥哥"),
    ("our neighbour", "我们的邻居"),
    ("the student", "那个学生"),
    ("the driver", "那位司机"),
)
# verb: third person, past, base, Chinese; its objects
_VERBS = (
    (("buys", "bought", "buy", "买"), ("book", "apple", "car", "hat", "fish", "lamp", "flower", "cup")),
    (("sells", "sold", "sell", "卖"), ("book", "apple", "car", "hat", "fish", "lamp", "flower")),
    (("sees", "saw", "see", "看见"), ("cat", "dog", "bird", "horse", "car", "tree", "flower", "fish")),
    (("draws", "drew", "draw", "画"), ("cat", "dog", "bird", "horse", "car", "tree", "flower", "fish")),
    (("finds", "found", "find", "找到"), ("book", "cat", "dog", "hat", "cup", "key", "lamp")),
    (("washes", "washed", "wash", "洗"), ("car", "cup", "apple", "hat", "dog", "horse")),
    (("loses", "lost", "lose", "丢"), ("book", "hat", "key", "cup", "dog")),
)
_OBJECTS = {
    "book": ("本", "书"),
    "apple": ("个", "苹果"),
    "car": ("辆", "汽车"),
    "hat": ("顶", "帽子"),
    "fish": ("条", "鱼"),
    "lamp": ("盏", "灯"),
    "flower": ("朵", "花"),
    "cup": ("个", "杯子"),
    "cat": ("只", "猫"),
    "dog": ("只", "狗"),
    "bird": ("只", "鸟"),
    "horse": ("匹", "马"),
    "tree": ("棵", "树"),
    "key": ("把", "钥匙"),
}
_ADJECTIVES = (
    ("red", "红色的"),
    ("blue", "蓝色的"),
    ("white", "白色的"),
    ("black", "黑色的"),
    ("big", "大的"),
    ("small", "小的"),
    ("new", "新的"),
    ("old", "旧的"),
    ("beautiful", "漂亮的"),
)
_PLACES = (
    ("in the park", "在公园"),
    ("at school", "在学校"),
    ("at home", "在家"),
    ("in the garden", "在花园"),
    ("at the station", "在车站"),
    ("at the market", "在市场"),
    ("by the river", "在河边"),
    ("in the village", "在村子里"),
    ("in the city", "在城里"),
    ("on the street", "在街上"),
)
_TIMES = (
    ("every day", "每天", 0),
    ("on Sundays", "每个星期天", 0),
    ("yesterday", "昨天", 1),
    ("last year", "去年", 1),
    ("tomorrow", "明天", 2),
    ("next week", "下周", 2),
)
_COUNTS = (("a", "一"), ("two", "两"), ("three", "三"), ("five", "五"), ("ten", "十"))

_EN_PROMPTS = (
    "Translate into Chinese: {text}",
    "Translate this sentence to Chinese: {text}",
    "How do you say this in Chinese? {text}",
    '"{text}" What is that in Chinese?',
    "{text}\nTranslate the sentence above into Chinese.",
)
_ZH_PROMPTS = (
    "翻译成英文：{text}",
    "请把这句话翻译成英文：{text}",
    "这句话用英文怎么说？{text}",
    "“{text}”用英语怎么说？",
    "{text}\n请把上面的句子翻译成英文。",
)


def _noun_phrase(rng: Random, noun: str) -> tuple[str, str]:
    measure, chinese_noun = _OBJECTS[noun]
    count, chinese_count = rng.choice(_COUNTS)
    adjective, chinese_adjective = rng.choice(_ADJECTIVES) if rng.random() < 0.6 else ("", "")
    many = noun if count == "a" or noun == "fish" else f"{noun}s"
    words = f"{adjective} {many}".strip()
    article = "an" if count == "a" and words[0] in "aeiou" else count
    return f"{article} {words}", f"{chinese_count}{measure}{chinese_adjective}{chinese_noun}"


def _sentence(rng: Random) -> tuple[str, str]:
    subject, chinese_subject = rng.choice(_SUBJECTS)
    verb, objects = rng.choice(_VERBS)
    thing, chinese_thing = _noun_phrase(rng, rng.choice(objects))
    place, chinese_place = rng.choice(_PLACES) if rng.random() < 0.6 else ("", "")
    time, chinese_time, tense = rng.choice(_TIMES)
    action = (verb[0], verb[1], f"will {verb[2]}")[tense]
    chinese_action = f"{verb[3]}了" if tense == 1 else verb[3]
    will = "要" if tense == 2 else ""
    english_text = " ".join(word for word in (subject, action, thing, place, time) if word)
    chinese_text = f"{chinese_subject}{chinese_time}{will}{chinese_place}{chinese_action}{chinese_thing}。"
    return f"{english_text[:1].upper()}{english_text[1:]}.", chinese_text


def english(rng: Random) -> tuple[str, str, str]:
    """One English sentence to be put into Chinese: (English sentence, prompt, Chinese sentence).

    >>> source, prompt, answer = english(Random(0))
    >>> source in prompt and answer.endswith("。")
    True
    """
    text, translated = _sentence(rng)
    return text, rng.choice(_EN_PROMPTS).format(text=text), translated


def chinese(rng: Random) -> tuple[str, str, str]:
    """One Chinese sentence to be put into English: (English sentence, prompt, English sentence).

    >>> source, prompt, answer = chinese(Random(0))
    >>> source == answer
    True
    """
    translated, text = _sentence(rng)
    return translated, rng.choice(_ZH_PROMPTS).format(text=text), translated
