"""Text to token ids and back: templates over columns, chat templates, few-shot, incremental decoding.

Knows no model, no table and no Dask. Users' text is data here: see :mod:`daskllm.text.vocabulary`.
"""

from daskllm.text.prompt import build, checked_examples
from daskllm.text.stream import Detokenizer
from daskllm.text.template import PromptTemplate
from daskllm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "PromptTemplate", "Tokenizer", "build", "checked_examples"]
