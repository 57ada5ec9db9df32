"""Prompt embeddings: computed once, bit-equal from memory and disk, and safe against damaged files."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from hnkit.scaled.pipelines.embeddings import MASK, EmbeddingCache, embedding_key
from tests.scaled import tiny
from tests.scaled.conftest import noise_for

PROMPTS = tiny.PROMPTS


class Counting:
    """An encoder that depends on the prompt alone and counts its calls."""

    def __init__(self, masked=True):
        self.masked = masked
        self.seen: list[str] = []

    def __call__(self, prompts):
        self.seen += prompts
        embeds, masks = [], []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(len(prompt))
            embeds.append(torch.randn(12, 3, generator=generator).bfloat16())
            masks.append((torch.arange(12) < len(prompt)).long())
        tensors = {"prompt_embeds": torch.stack(embeds), "pooled": torch.stack(embeds)[:, 0]}
        return tensors | ({MASK: torch.stack(masks)} if self.masked else {})


@pytest.mark.parametrize("masked", [True, False])
def test_once_in_memory_and_once_on_disk(masked, tmp_path):
    words = ["abc", "a", "", "abcdefgh", "abcdefghijklmnop"]
    encoder = Counting(masked)
    fresh = encoder(words)
    expected = dict(fresh)
    if masked:
        expected["prompt_embeds"] = fresh["prompt_embeds"] * fresh[MASK][..., None].bfloat16()
    encoder.seen.clear()
    cache = EmbeddingCache(encoder, tmp_path)
    cache.store(words)
    assert encoder.seen == words
    order = ["abcdefgh", "abc", "abc", "abcdefghijklmnop", ""]
    index = [words.index(word) for word in order]
    for store in (cache, EmbeddingCache(encoder, tmp_path)):
        found = store.rows(order)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value.dtype == expected[key].dtype
            assert torch.equal(value, expected[key][index]), key
        store.store(words)
    assert encoder.seen == words, "encoded again"
    assert "abc" in cache
    assert "xyz" not in cache


def test_unknown_prompts_are_encoded_together_without_repeats(tmp_path):
    encoder = Counting()
    cache = EmbeddingCache(encoder, None, in_memory=2)
    cache.rows(["a", "bb", "a"])
    assert encoder.seen == ["a", "bb"]
    cache.rows(["ccc"])
    cache.rows(["bb"])
    assert encoder.seen == ["a", "bb", "ccc"]
    cache.rows(["a"])
    assert encoder.seen == ["a", "bb", "ccc", "a"], "the least recently used row had to go"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_damaged_files_are_encoded_again(damage, tmp_path):
    encoder = Counting()
    EmbeddingCache(encoder, tmp_path).store(["abc", "abcd"])
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    broken = {"truncated": content[:-5], "flipped": content, "empty": b"", "text": b"not safetensors"}[damage]
    encoder.seen.clear()
    ready = EmbeddingCache(encoder, tmp_path)  # indexed before the damage, and after it
    path.write_bytes(bytes(broken))
    for cache in (ready, EmbeddingCache(encoder, tmp_path)):
        encoder.seen.clear()
        found = cache.rows(["abc", "abcd"])
        assert torch.equal(found["pooled"], Counting()(["abc", "abcd"])["pooled"])
        assert encoder.seen
    assert not path.exists() or ready


def test_the_key_is_the_content_of_the_text_side_and_the_settings(checkpoint, tmp_path):
    """Neither names nor times: a copy has the same key, and other weights another, whatever `cp -p` says of them."""
    folder = tiny.build("sana", tmp_path / "one")
    parts = ["text_encoder", "tokenizer"]

    def key(where, **settings):
        return embedding_key(where, parts, {"max_sequence_length": 300} | settings)

    first = key(folder)
    assert first == key(folder)
    assert first != key(folder, max_sequence_length=77)
    assert first == key(shutil.copytree(folder, tmp_path / "copy"))
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert weights.stat().st_size == status.st_size
    assert key(folder) != first
    (folder / "transformer" / "config.json").write_text("{}")  # says nothing about text
    content[-1] ^= 1
    weights.write_bytes(content)
    assert key(folder) == first


@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_an_embedding_does_not_depend_on_what_is_encoded_beside_it(name, make_backend, tmp_path):
    alone = {prompt: make_backend(name).encode([prompt]).tensors for prompt in PROMPTS}
    together = make_backend(name).encode(PROMPTS).tensors
    stored = make_backend(name, cache_dir=str(tmp_path))
    stored.prepare([*reversed(PROMPTS), "something else"])
    for number, prompt in enumerate(PROMPTS):
        for key, value in alone[prompt].items():
            assert torch.equal(together[key][number], value[0]), key
            assert torch.equal(stored.encode([prompt]).tensors[key], value), key


@pytest.mark.parametrize("where", ["below a file", "full", "read only"])
def test_a_folder_that_cannot_be_used_costs_only_time(where, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "cache" if where == "below a file" else tmp_path / "cache"
    if where != "below a file":
        EmbeddingCache(Counting(), folder).store(["abc"])

        def full(path, content):
            raise OSError({"full": errno.ENOSPC, "read only": errno.EROFS}[where], "no")

        monkeypatch.setattr("hnkit.scaled.pipelines.embeddings.atomic_write", full)
    encoder = Counting()
    cache = EmbeddingCache(encoder, folder)
    cache.store(["abc", "a", "ab"])
    found = cache.rows(["ab", "abc"])
    assert torch.equal(found["pooled"], Counting()(["ab", "abc"])["pooled"])
    assert encoder.seen == (["abc", "a", "ab"] if where == "below a file" else ["a", "ab"])


def test_nobody_needs_a_home(monkeypatch, make_backend):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    backend = make_backend("sana", cache_dir="auto")
    backend.prepare(PROMPTS)
    assert len(backend.encode(PROMPTS)) == len(PROMPTS)
    assert len(backend.model_digest()) == 64


@pytest.mark.parametrize("name", ["sana", "sd-turbo", "flux"])
def test_text_encoder_is_not_needed_after_preparing(name, make_backend, tmp_path, monkeypatch):
    first = make_backend(name, cache_dir=str(tmp_path))
    first.prepare(PROMPTS)
    condition = first.encode(PROMPTS)
    assert not any(value.requires_grad or value.is_inference() for value in condition.tensors.values())
    second = make_backend(name, cache_dir=str(tmp_path))

    def refuse(*arguments, **keywords):
        raise AssertionError("the text encoder was called")

    monkeypatch.setattr(second._encoder_pipe, "encode_prompt", refuse)
    again = second.encode(PROMPTS)
    assert again.prompts == tuple(PROMPTS)
    for key, value in condition.tensors.items():
        assert torch.equal(again.tensors[key], value)
    assert second.pipeline.text_encoder is None
    noise = noise_for(second)
    with torch.no_grad():
        assert torch.equal(second.generate(noise, again), first.generate(noise, condition))


def test_embeddings_encoded_under_inference_mode_can_be_trained_on(make_backend):
    backend = make_backend("sana")
    with torch.inference_mode():
        backend.encode(PROMPTS)
    condition, noise = backend.encode(PROMPTS), noise_for(backend)
    backend.generate(noise + backend.hypernetwork(noise, condition), condition).sum().backward()


def test_the_text_encoder_is_moved_once_for_a_prompt_set_not_once_a_prompt(make_backend, monkeypatch):
    backend = make_backend("sana")
    backend.encode(["a warm-up"])
    moved = []
    encoder = backend._encoder_pipe.text_encoder
    monkeypatch.setattr(encoder, "to", lambda device: moved.append(device))
    backend.prepare([f"prompt {i}" for i in range(5)])
    assert len(moved) == 2  # there and back
