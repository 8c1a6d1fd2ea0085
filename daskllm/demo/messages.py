"""Customers' messages that hold an order number and a date: two of the tasks of the bundled model.

Owns the words and the grammar of the messages. Dates are written in several ways and answered as
``YYYY-MM-DD``; order numbers are answered as written. Prices, phone numbers and times stand around them, so
that the answer is not simply the only number there.
"""

from __future__ import annotations

import string
from random import Random

__all__ = ["chinese_date", "chinese_order", "english_date", "english_order"]

_MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_EN_NAMES = ("Anna", "Tom", "Lucy", "Peter", "Maria", "Jack", "Nina", "Omar", "Grace", "Leo")
_EN_ITEMS = (
    "lamp",
    "kettle",
    "backpack",
    "keyboard",
    "coffee machine",
    "pair of shoes",
    "desk",
    "camera",
    "tent",
    "watch",
    "bicycle helmet",
    "rice cooker",
)
_EN_GREETINGS = ("Hi,", "Hello,", "Dear team,", "Good morning,", "Hey,", "To whom it may concern,")
_EN_ORDER = (
    "my order {order} has not arrived yet.",
    "I am writing about order {order}.",
    "the {item} from order {order} is broken.",
    "please cancel order {order}.",
    "could you check the status of order number {order}?",
    "I would like to return the {item} (order {order}).",
    "order {order} came with the wrong colour.",
)
_EN_DATE = (
    "I placed it on {date}.",
    "It should have been here by {date}.",
    "The parcel was sent on {date}.",
    "Please deliver it on {date}.",
    "I moved house on {date}.",
    "I need the {item} before {date}.",
    "Our meeting is on {date}.",
)
_EN_OTHER = (
    "I paid ${price} for the {item}.",
    "You can call me at {phone}.",
    "I am at home after {hour}:{minute}.",
    "There were {few} items in the box.",
    "My name is {name}.",
    "The invoice says ${price}.",
)
_EN_CLOSINGS = (
    "Thanks, {name}",
    "Best regards, {name}",
    "Thank you!",
    "Please help.",
    "{name}",
    "Regards, {name}",
)
_EN_ORDER_PROMPTS = (
    "Find the order number in this message: {text}",
    "What is the order number? {text}",
    "{text}\nWhat is the order number in this message?",
    "Extract the order number.\n{text}",
    'A customer wrote: "{text}" Which order number is meant?',
)
_EN_DATE_PROMPTS = (
    "Find the date in this message (YYYY-MM-DD): {text}",
    "Which date is mentioned? Answer as YYYY-MM-DD. {text}",
    "{text}\nWhich date is in this message? Answer as YYYY-MM-DD.",
    "Extract the date as YYYY-MM-DD.\n{text}",
    'A customer wrote: "{text}" What is the date, as YYYY-MM-DD?',
)

_ZH_NAMES = ("小明", "小红", "李雷", "王芳", "张伟", "刘洋", "陈静", "赵敏", "何平", "孙丽")
_ZH_ITEMS = (
    "台灯",
    "水壶",
    "背包",
    "键盘",
    "咖啡机",
    "鞋子",
    "书桌",
    "相机",
    "帐篷",
    "手表",
    "头盔",
    "电饭锅",
)
_ZH_GREETINGS = ("你好，", "您好，", "客服您好，", "早上好，", "请问在吗？", "打扰一下，")
_ZH_ORDER = (
    "我的订单{order}还没有到。",
    "我想咨询订单{order}。",
    "订单{order}里的{item}坏了。",
    "请取消订单{order}。",
    "能帮我查一下订单号{order}的状态吗？",
    "我想退掉{item}（订单{order}）。",
    "订单{order}的颜色发错了。",
)
_ZH_DATE = (
    "我是{date}下的单。",
    "本来应该在{date}之前送到。",
    "包裹是{date}寄出的。",
    "请在{date}送货。",
    "我{date}搬家了。",
    "{date}之前我要用到{item}。",
    "我们约在{date}见面。",
)
_ZH_OTHER = (
    "{item}花了我{price}元。",
    "我的电话是{phone}。",
    "我{hour}:{minute}以后在家。",
    "箱子里有{few}件东西。",
    "我叫{name}。",
    "发票上写着{price}元。",
)
_ZH_CLOSINGS = ("谢谢，{name}", "麻烦了。", "谢谢！", "请帮帮我。", "{name}", "祝好，{name}")
_ZH_ORDER_PROMPTS = (
    "找出这条留言里的订单号：{text}",
    "订单号是多少？{text}",
    "{text}\n这条留言里的订单号是什么？",
    "请提取订单号。\n{text}",
    "顾客写道：“{text}”他说的是哪个订单号？",
)
_ZH_DATE_PROMPTS = (
    "找出这条留言里的日期（格式：年-月-日）：{text}",
    "留言里提到了哪一天？用年-月-日回答。{text}",
    "{text}\n这条留言里的日期是哪天？用年-月-日回答。",
    "请按年-月-日的格式提取日期。\n{text}",
    "顾客写道：“{text}”日期是哪天？用年-月-日回答。",
)


def _digits(rng: Random, count: int) -> str:
    return "".join(rng.choice(string.digits) for _ in range(count))


def _order(rng: Random) -> str:
    kind = rng.randrange(5)
    letters = "".join(rng.choice(string.ascii_uppercase) for _ in range(2))
    if kind == 0:
        return f"{letters}-{_digits(rng, 5)}"
    if kind == 1:
        return f"{letters[0]}{_digits(rng, 6)}"
    if kind == 2:
        return _digits(rng, 8)
    if kind == 3:
        return f"#{_digits(rng, 5)}"
    return f"{_digits(rng, 4)}-{letters}{_digits(rng, 2)}"


def _date(rng: Random) -> tuple[int, int, int]:
    return rng.randint(2015, 2029), rng.randint(1, 12), rng.randint(1, 28)


def _english_date(rng: Random, year: int, month: int, day: int) -> str:
    name = _MONTHS[month - 1]
    return rng.choice(
        (
            f"{name} {day}, {year}",
            f"{day} {name} {year}",
            f"{name[:3]} {day}, {year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{year}/{month}/{day}",
        )
    )


def _chinese_date(rng: Random, year: int, month: int, day: int) -> str:
    return rng.choice(
        (
            f"{year}年{month}月{day}日",
            f"{year}年{month}月{day}号",
            f"{year}-{month:02d}-{day:02d}",
            f"{year}/{month}/{day}",
            f"{year}.{month}.{day}",
        )
    )


def _small(rng: Random, names: tuple[str, ...], items: tuple[str, ...]) -> dict[str, str]:
    return {
        "name": rng.choice(names),
        "item": rng.choice(items),
        "price": str(rng.randint(5, 999)),
        "phone": f"{rng.randint(200, 999)}-{_digits(rng, 4)}",
        "hour": str(rng.randint(7, 21)),
        "minute": rng.choice(("00", "15", "30", "45")),
        "few": str(rng.randint(2, 9)),
    }


def _english(rng: Random, asked: str) -> tuple[str, str, str]:
    """A message around its asked part: (message, order number, date as YYYY-MM-DD)."""
    order, date = _order(rng), _date(rng)
    words = _small(rng, _EN_NAMES, _EN_ITEMS)
    parts = [rng.choice(_EN_ORDER)] if asked == "order" else [rng.choice(_EN_DATE)]
    if rng.random() < 0.5:
        parts.append(rng.choice(_EN_DATE if asked == "order" else _EN_ORDER))
    parts += rng.sample(_EN_OTHER, rng.randrange(2))
    rng.shuffle(parts)
    greeting = rng.choice(_EN_GREETINGS) if rng.random() < 0.7 else ""
    parts = [part[:1].upper() + part[1:] for part in parts]
    if greeting and not parts[0].startswith("I "):
        parts[0] = parts[0][:1].lower() + parts[0][1:]
    closing = [rng.choice(_EN_CLOSINGS)] if rng.random() < 0.6 else []
    text = " ".join([greeting, *parts, *closing]).strip()
    text = text.format(order=order, date=_english_date(rng, *date), **words)
    return text, order, "{}-{:02d}-{:02d}".format(*date)


def _chinese(rng: Random, asked: str) -> tuple[str, str, str]:
    """A message around its asked part: (message, order number, date as YYYY-MM-DD)."""
    order, date = _order(rng), _date(rng)
    words = _small(rng, _ZH_NAMES, _ZH_ITEMS)
    parts = [rng.choice(_ZH_ORDER)] if asked == "order" else [rng.choice(_ZH_DATE)]
    if rng.random() < 0.5:
        parts.append(rng.choice(_ZH_DATE if asked == "order" else _ZH_ORDER))
    parts += rng.sample(_ZH_OTHER, rng.randrange(2))
    rng.shuffle(parts)
    greeting = rng.choice(_ZH_GREETINGS) if rng.random() < 0.7 else ""
    closing = rng.choice(_ZH_CLOSINGS) if rng.random() < 0.6 else ""
    text = "".join([greeting, *parts, closing])
    text = text.format(order=order, date=_chinese_date(rng, *date), **words)
    return text, order, "{}-{:02d}-{:02d}".format(*date)


def english_order(rng: Random) -> tuple[str, str, str]:
    """One English message with an order number: (message, prompt, order number as written).

    >>> message, prompt, answer = english_order(Random(0))
    >>> answer in message and message in prompt
    True
    """
    text, order, _ = _english(rng, "order")
    return text, rng.choice(_EN_ORDER_PROMPTS).format(text=text), order


def english_date(rng: Random) -> tuple[str, str, str]:
    """One English message with a date: (message, prompt, date as YYYY-MM-DD).

    >>> message, prompt, answer = english_date(Random(0))
    >>> len(answer), message in prompt
    (10, True)
    """
    text, _, date = _english(rng, "date")
    return text, rng.choice(_EN_DATE_PROMPTS).format(text=text), date


def chinese_order(rng: Random) -> tuple[str, str, str]:
    """One Chinese message with an order number: (message, prompt, order number as written).

    >>> message, prompt, answer = chinese_order(Random(0))
    >>> answer in message and message in prompt
    True
    """
    text, order, _ = _chinese(rng, "order")
    return text, rng.choice(_ZH_ORDER_PROMPTS).format(text=text), order


def chinese_date(rng: Random) -> tuple[str, str, str]:
    """One Chinese message with a date: (message, prompt, date as YYYY-MM-DD).

    >>> message, prompt, answer = chinese_date(Random(0))
    >>> len(answer), message in prompt
    (10, True)
    """
    text, _, date = _chinese(rng, "date")
    return text, rng.choice(_ZH_DATE_PROMPTS).format(text=text), date
