"""Tokenizers and chat templates of many kinds, each pair with a processor, and random chats that are hard on the seams."""

import random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from diffvl.demo.standins import MERGES
from diffvl.hub.processing_diffvl import DiffVLProcessor

ASK = "{% if add_generation_prompt %}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    + ASK
    + "<|start|>assistant<|end|>\n\n{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }} {% else %}A chat. {% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: {{ m['content'] }} {% elif m['role'] == 'assistant' %}ASSISTANT: {{ m['content'] }}"
    "{{ eos_token }}{% endif %}{% endfor %}" + ASK + "ASSISTANT:{% endif %}"
)
VICUNA_SPACE = VICUNA.replace("ASSISTANT:{% endif", "ASSISTANT: {% endif")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set first = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set first = '' %}{% endif %}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ (first if loop.index0 == 0 else '') + m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|start|>system\nBe kind.<|eot|>\n{% endif %}{% for m in messages %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|eot|>{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    + ASK
    + "{{ '\n' }}<|start|>assistant\n{% endif %}"
)
TRACKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|eot|>{% endif %}\n{% endfor %}" + ASK + "<|start|>assistant\n{% endif %}"
)
ESCAPED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'] | replace('&', '&amp;') if m['role'] == 'user' else m['content'] }}<|eot|>\n{% endfor %}"
    + ASK
    + "<|start|>assistant\n{% endif %}"
)
TEMPLATES = {
    **{"llama3": LLAMA3, "vicuna": VICUNA, "vicuna space": VICUNA_SPACE, "mistral": MISTRAL, "llama2": LLAMA2},
    **{"default system": DEFAULT_SYSTEM, "generation": TRACKED, "escaped": ESCAPED},
}
STOPS = {"vicuna": "</s>", "vicuna space": "</s>", "mistral": "</s>", "llama2": "</s>"}
CONTROL = ["<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>", "[INST]", "[/INST]"]


def _byte_level(trim: bool = False, prefix: bool = False, regex: bool = True, nfc: bool = False) -> Tokenizer:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [*MERGES, ("Ċ", "Ċ"), ("Ġ", "Ġ"), (":", "Ġ"), ("Ġ", "o"), ("Ċ", "Ġ"), ("ĠĠ", "Ġ")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *dict.fromkeys(a + b for a, b in merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix)
    bpe.decoder = decoders.ByteLevel()
    if nfc:
        bpe.normalizer = normalizers.NFC()
    return bpe


def _sentencepiece(scheme: Any) -> Tokenizer:
    """BPE with byte fallback behind Metaspace, or behind the normaliser that came before it."""
    letters = [chr(code) for code in range(33, 127)]
    merges = [("▁", "a"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁"), ("S", "T"), (":", "▁")]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *(a + b for a, b in merges)]))}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if scheme == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "never")
    return bpe


def _unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127)), ("▁the", -3.0), ("▁▁", -2.5)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return unigram


def _words() -> Tokenizer:
    """White space is no token at all here, and what is unknown is one."""
    vocab = {piece: number for number, piece in enumerate(["[UNK]", *(chr(code) for code in range(33, 127)), "the", "##n"])}
    words = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # type: ignore[call-arg]
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return words


BACKENDS = {
    "byte level": _byte_level,
    "byte level, trimmed": lambda: _byte_level(trim=True),
    "byte level, NFC": lambda: _byte_level(nfc=True),
    "byte level, prefix": lambda: _byte_level(prefix=True),
    "byte level, prefix, trimmed": lambda: _byte_level(prefix=True, trim=True),
    "byte level, whole, trimmed": lambda: _byte_level(regex=False, trim=True),
    "metaspace first": lambda: _sentencepiece("first"),
    "metaspace always": lambda: _sentencepiece("always"),
    "metaspace never": lambda: _sentencepiece("never"),
    "prepend": lambda: _sentencepiece("prepend"),
    "unigram": _unigram,
    "words": _words,
}


def zoo_tokenizer(kind: str, flags: dict[str, bool] | None = None) -> Any:
    """One of BACKENDS with the control tokens of all templates. flags: of these tokens."""
    backend = BACKENDS[kind]()
    added = [AddedToken(text, **{"special": True, "normalized": False, **(flags or {})}) for text in CONTROL]
    if not flags or flags.get("special", True):
        backend.add_special_tokens(added)
    else:
        backend.add_tokens(added)
    backend.add_tokens([AddedToken("<think>", normalized=False), AddedToken("\n\n\n", normalized=False)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def chat_processor(tokenizer: Any, template: str, stop_token: str, image_tokens: int = 3, **settings: Any) -> DiffVLProcessor:
    """The chat half of a processor, without an image processor."""
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    tokenizer.add_tokens([AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.chat_template = template
    processor = DiffVLProcessor.__new__(DiffVLProcessor)
    facts = {"tokenizer": tokenizer, "image_token": "<image>", "image_tokens": image_tokens, "stop_token": stop_token}
    for name, value in {**facts, **settings}.items():
        setattr(processor, name, value)
    return processor


WORDS = (
    *("the", "the the", "a red dot", "an", "on the", "9", "x", ".", ":", "USER:", " ASSISTANT:", "user", "assistant\n"),
    *("naïve", "nai\u0308ve", "\u0308", "\u0338", "汉字", "🙂", "👩\u200d🚀", "\u00a0", "\u3000", "ﬁ", "\u200b", "½", "\u2028"),
    *("<think>", "</think>", "<b>&amp;</b>", "{{ x }}", "{% y %}", "\\n", "[INS", "<|", "\t", "<<SYS>>", "▁", "Ġ", "<imag"),
    *(" ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\r\n", ""),
)


def random_text(source: random.Random) -> str:
    return "".join(source.choices(WORDS, k=source.choice((0, 1, 1, 2, 4, 9))))


def random_chat(source: random.Random, system: bool, rounds: int | None = None) -> list[dict[str, Any]]:
    """Up to six rounds, images in any question and beside each other, sometimes no answer at the end."""
    chat: list[dict[str, Any]] = []
    if system and source.random() < 0.4:
        chat.append({"role": "system", "content": random_text(source)})
    for _ in range(rounds or source.randint(1, 6)):
        content: Any = random_text(source)
        if source.random() < 0.4:
            content = []
            for _ in range(source.randint(1, 4)):
                content.append({"type": "image"} if source.random() < 0.5 else {"type": "text", "text": random_text(source)})
        chat += [{"role": "user", "content": content}, {"role": "assistant", "content": random_text(source)}]
    return chat if source.random() < 0.7 else chat[:-1]
