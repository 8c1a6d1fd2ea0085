"""Reviews that are positive or negative: one of the tasks that the bundled model learns.

Owns the words and the grammar of the reviews. It knows nothing of the model, of the split, or of the other
tasks. The rule behind a review: its last statement decides, and a negated word counts as its opposite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random

__all__ = ["chinese", "english"]

_EN_THINGS = {
    "phone": ("battery", "screen", "camera", "speaker", "charger"),
    "laptop": ("keyboard", "screen", "battery", "fan", "touchpad"),
    "hotel": ("room", "staff", "breakfast", "pool", "location"),
    "restaurant": ("food", "service", "soup", "dessert", "menu"),
    "book": ("plot", "ending", "writing", "cover", "translation"),
    "movie": ("acting", "story", "music", "ending", "dialogue"),
    "jacket": ("fabric", "zipper", "colour", "fit", "lining"),
    "blender": ("motor", "lid", "design", "manual", "price"),
    "app": ("design", "search", "support", "speed", "price"),
    "course": ("teacher", "homework", "pace", "content", "price"),
}
_EN_ADJECTIVES = {
    True: (
        "great",
        "excellent",
        "wonderful",
        "fantastic",
        "superb",
        "lovely",
        "impressive",
        "perfect",
        "brilliant",
        "outstanding",
        "delightful",
        "amazing",
    ),
    False: (
        "terrible",
        "awful",
        "poor",
        "disappointing",
        "horrible",
        "dreadful",
        "useless",
        "broken",
        "annoying",
        "ugly",
        "cheap",
        "bad",
    ),
}
_EN_STATEMENTS = {
    True: (
        "the {aspect} is {same}",
        "the {aspect} was really {same}",
        "I love the {aspect}",
        "the {aspect} is not {other} at all",
        "the {aspect} exceeded my expectations",
        "the {aspect} works like a charm",
        "I am very happy with the {aspect}",
        "the {aspect} is far from {other}",
    ),
    False: (
        "the {aspect} is {same}",
        "the {aspect} was really {same}",
        "I hate the {aspect}",
        "the {aspect} is not {other} at all",
        "the {aspect} let me down",
        "the {aspect} gave up after a week",
        "I am not happy with the {aspect}",
        "the {aspect} is far from {other}",
    ),
}
_EN_VERDICTS = {
    True: (
        "I would buy it again",
        "highly recommended",
        "worth every penny",
        "I would not change a thing",
        "my whole family loves it",
        "five stars from me",
        "I can only recommend it",
        "I have no complaints",
    ),
    False: (
        "I want my money back",
        "do not buy it",
        "a waste of money",
        "I would not recommend it",
        "my whole family hates it",
        "one star from me",
        "never again",
        "I regret this purchase",
    ),
}
_EN_INTROS = (
    "I got this {thing} {when}.",
    "We tried the {thing} {when}.",
    "My {who} told me about this {thing}.",
    "This is my {nth} {thing}.",
    "I picked this {thing} for my {who}.",
    "About the {thing}:",
)
_EN_WHEN = ("last week", "yesterday", "in May", "two months ago", "on holiday", "a year ago")
_EN_WHO = ("sister", "brother", "boss", "neighbour", "mother", "friend")
_EN_NTH = ("first", "second", "third")
_EN_PROMPTS = (
    "Is this review positive or negative? {text}",
    "Is the following review positive or negative?\n{text}",
    "{text}\nIs this review positive or negative?",
    "Review: {text} Sentiment (positive or negative)?",
    "Classify the sentiment of this review as positive or negative: {text}",
    'A customer wrote: "{text}" Is that positive or negative?',
)

_ZH_THINGS = {
    "手机": ("电池", "屏幕", "相机", "声音", "充电器"),
    "电脑": ("键盘", "屏幕", "电池", "风扇", "外观"),
    "酒店": ("房间", "服务", "早餐", "位置", "泳池"),
    "餐厅": ("菜品", "服务", "汤", "甜点", "环境"),
    "书": ("情节", "结局", "文笔", "封面", "翻译"),
    "电影": ("演员", "故事", "音乐", "结局", "画面"),
    "外套": ("面料", "拉链", "颜色", "做工", "版型"),
    "软件": ("界面", "搜索", "客服", "速度", "价格"),
    "课程": ("老师", "作业", "进度", "内容", "价格"),
}
_ZH_ADJECTIVES = {
    True: ("好", "棒", "出色", "完美", "让人满意", "让人惊喜", "优秀", "可靠", "舒服", "精彩"),
    False: ("差", "糟糕", "一般", "失败", "让人失望", "让人生气", "劣质", "难看", "无聊", "可怕"),
}
_ZH_STATEMENTS = {
    True: (
        "{aspect}很{same}",
        "{aspect}非常{same}",
        "我喜欢它的{aspect}",
        "{aspect}一点也不{other}",
        "{aspect}超出了我的期待",
        "{aspect}没有让我后悔",
        "我对{aspect}很满意",
        "{aspect}值得称赞",
    ),
    False: (
        "{aspect}很{same}",
        "{aspect}非常{same}",
        "我讨厌它的{aspect}",
        "{aspect}一点也不{other}",
        "{aspect}没有达到我的期待",
        "{aspect}让我后悔",
        "我对{aspect}不满意",
        "{aspect}问题太多",
    ),
}
_ZH_VERDICTS = {
    True: ("下次还会再来", "强烈推荐", "物有所值", "全家人都喜欢", "给五星", "没有什么可挑剔的", "真心不错"),
    False: ("再也不会来了", "不推荐", "浪费钱", "全家人都不喜欢", "只给一星", "我要退货", "真心不值"),
}
_ZH_INTROS = (
    "{when}买的这{measure}{thing}。",
    "{who}推荐的{thing}。",
    "第{nth}次选这{measure}{thing}。",
    "说说这{measure}{thing}。",
    "{when}和{who}一起试了这{measure}{thing}。",
)
_ZH_MEASURES = {
    "手机": "部",
    "电脑": "台",
    "酒店": "家",
    "餐厅": "家",
    "书": "本",
    "电影": "部",
    "外套": "件",
    "软件": "个",
    "课程": "门",
}
_ZH_WHEN = ("上周", "昨天", "五月", "两个月前", "去年", "放假时")
_ZH_WHO = ("姐姐", "哥哥", "老板", "邻居", "妈妈", "朋友")
_ZH_NTH = ("一", "二", "三")
_ZH_PROMPTS = (
    "这条评论是正面还是负面？{text}",
    "下面的评论是正面还是负面？\n{text}",
    "{text}\n这条评论是正面还是负面？",
    "评论：{text}情感（正面或负面）？",
    "请判断这条评论的情感，回答正面或负面：{text}",
    "顾客写道：“{text}”这是正面还是负面？",
)


def _body(
    rng: Random,
    positive: bool,
    first: Callable[[bool], str],
    second: Callable[[bool], str],
    verdicts: Mapping[bool, Sequence[str]],
) -> list[str]:
    """Statements and the joints between them; every joint but "but" keeps the direction."""
    shape = rng.randrange(5)
    if shape == 0:
        return [first(positive)]
    if shape == 1:
        return [first(positive), "and", second(positive)]
    if shape == 2:
        return [first(not positive), "but", second(positive)]
    if shape == 3:
        return [first(positive), "stop", rng.choice(verdicts[positive])]
    return [first(not positive), "but", rng.choice(verdicts[positive])]


def english(rng: Random) -> tuple[str, str, str]:
    """One English review: (review, prompt, "positive" or "negative").

    >>> english(Random(1))[2] in ("positive", "negative")
    True
    """
    positive = rng.random() < 0.5
    thing = rng.choice(tuple(_EN_THINGS))
    first, second = rng.sample(_EN_THINGS[thing], 2)

    def state(aspect: str, good: bool) -> str:
        return rng.choice(_EN_STATEMENTS[good]).format(
            aspect=aspect, same=rng.choice(_EN_ADJECTIVES[good]), other=rng.choice(_EN_ADJECTIVES[not good])
        )

    body = _body(
        rng, positive, lambda good: state(first, good), lambda good: state(second, good), _EN_VERDICTS
    )
    joined = {"and": " and ", "but": ", but ", "stop": ". "}
    text = "".join(joined.get(piece, piece) for piece in body)
    text = ". ".join(sentence[:1].upper() + sentence[1:] for sentence in text.split(". ")) + rng.choice(
        (".", "!")
    )
    if rng.random() < 0.6:
        intro = rng.choice(_EN_INTROS).format(
            thing=thing, when=rng.choice(_EN_WHEN), who=rng.choice(_EN_WHO), nth=rng.choice(_EN_NTH)
        )
        text = f"{intro} {text}"
    return text, rng.choice(_EN_PROMPTS).format(text=text), "positive" if positive else "negative"


def chinese(rng: Random) -> tuple[str, str, str]:
    """One Chinese review: (review, prompt, "正面" or "负面").

    >>> chinese(Random(1))[2] in ("正面", "负面")
    True
    """
    positive = rng.random() < 0.5
    thing = rng.choice(tuple(_ZH_THINGS))
    first, second = rng.sample(_ZH_THINGS[thing], 2)

    def state(aspect: str, good: bool) -> str:
        return rng.choice(_ZH_STATEMENTS[good]).format(
            aspect=aspect, same=rng.choice(_ZH_ADJECTIVES[good]), other=rng.choice(_ZH_ADJECTIVES[not good])
        )

    body = _body(
        rng, positive, lambda good: state(first, good), lambda good: state(second, good), _ZH_VERDICTS
    )
    joined = {"and": "，", "but": "，但是", "stop": "。"}
    text = "".join(joined.get(piece, piece) for piece in body) + rng.choice(("。", "！"))
    if rng.random() < 0.6:
        intro = rng.choice(_ZH_INTROS).format(
            thing=thing,
            measure=_ZH_MEASURES[thing],
            when=rng.choice(_ZH_WHEN),
            who=rng.choice(_ZH_WHO),
            nth=rng.choice(_ZH_NTH),
        )
        text = intro + text
    return text, rng.choice(_ZH_PROMPTS).format(text=text), "正面" if positive else "负面"
