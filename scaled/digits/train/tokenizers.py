"""Tokenizers of the real classes over the small vocabulary: each word of the grammar becomes one token."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, GemmaTokenizer

from hnkit.scaled.digits.scenes import MAX_WORDS, VOCABULARY

GEMMA_LENGTH = MAX_WORDS + 1  # the beginning-of-sequence token and the words
CLIP_LENGTH = MAX_WORDS + 2  # start, words, end


def _merges(words: list[str], suffix: str | None) -> list[tuple[str, str]]:
    """Byte-pair merges that build each word whole, learned from the word list."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=suffix) if suffix else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=1, show_progress=False)
    if suffix:
        trainer.end_of_word_suffix = suffix
    tokenizer.train_from_iterator(words, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def _vocabulary(special: list[str], words: list[str], merges: list[tuple[str, str]], suffix: str) -> dict[str, int]:
    letters = sorted({letter for word in words for letter in word})
    tokens = [*special, *letters, *(letter + suffix for letter in letters if suffix), *("".join(m) for m in merges)]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that knows the grammar's words, with and without the leading space mark."""
    words = sorted({*VOCABULARY, *("▁" + word for word in VOCABULARY)})
    merges = _merges(words, None)
    vocabulary = _vocabulary(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], words, merges, "")
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, model_max_length=300, add_bos_token=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the grammar's words."""
    words = sorted(VOCABULARY)
    merges = _merges(words, "</w>")
    vocabulary = _vocabulary(["<|startoftext|>", "<|endoftext|>"], words, merges, "</w>")
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)
