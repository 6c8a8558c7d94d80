"""A small model that is trained on the docstrings of Python's standard library, and stops to be looked at.

What `bigram_dynamics.py` follows: a Llama-style model (RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings) of
630,000 parameters, with the tokenizer of the embedded model, trained with AdamW in float32 on the CPU. Everything depends on the
seed and the text alone.
"""

from __future__ import annotations

import copy
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from ngram_studies import docstrings
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tl_jets.core.tokens import token_names
from tl_jets.ngrams.tables import NgramTable
from tl_jets.pretrained import TINYDOCS

BOS = 1
IGNORED = -100  # a target that is not scored
NOT_READ = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
EVERY = 20  # one file in so many is held out
SAMPLED = 128  # windows of the training text over which the model's own predictions are averaged


@dataclass(frozen=True)
class Recipe:
    """The model and its training."""

    steps: int = 800
    batch: int = 16
    context: int = 128
    rate: float = 5e-3
    doublings: int = 8
    n_layers: int = 2
    d_model: int = 64
    d_mlp: int = 192
    n_heads: int = 2
    seed: int = 0

    @property
    def looked_at(self) -> list[int]:
        """0, and steps that double and end with the last one."""
        return sorted({0, *(self.steps >> doubling for doubling in range(self.doublings + 1))})

    def build(self, d_vocab: int) -> transformers.LlamaForCausalLM:
        """The untrained model."""
        torch.manual_seed(self.seed)
        config = transformers.LlamaConfig(
            vocab_size=d_vocab,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=2,
            pad_token_id=2,
        )
        return transformers.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Text:
    """Paragraphs as tokens."""

    tokenizer: Any
    training: list[list[int]]
    held_out: list[list[int]]

    @classmethod
    def of(cls, files: list[Path], tokenizer: Any) -> Text:
        """Docstrings of some files; those of every `EVERY`-th are held out, but for what the others have, too."""
        apart = [docstrings(x for i, x in enumerate(files) if (i % EVERY == 0) == held) for held in (False, True)]
        known = set(apart[0])
        apart[1] = [x for x in apart[1] if x not in known]
        return cls(tokenizer, *(tokenizer(x, add_special_tokens=False)["input_ids"] for x in apart))

    @property
    def d_vocab(self) -> int:
        """How many tokens there are."""
        return len(self.tokenizer)

    def windows(self, context: int, *, held_out: bool = False) -> Tensor:
        """The text in windows `[window, context + 1]`, a `<s>` before each paragraph."""
        paragraphs = self.held_out if held_out else self.training
        stream = torch.tensor([token for x in paragraphs for token in (BOS, *x)])
        count = (len(stream) - 1) // context
        return stream.as_strided((count, context + 1), (context, 1))


@dataclass
class Training:
    """A training run that stops at some steps to be looked at, and writes down what the model itself does there.

    Attributes:
        nats: Held-out loss a token at each of these steps.
        own: The n best bi-grams of its predictions, averaged over the sample.
        own_scores: Logarithms of these averages for the given pairs, `[step][pair]`.
    """

    recipe: Recipe
    text: Text
    pairs: Tensor
    unigram: Tensor
    n: int
    nats: list[float] = field(default_factory=list)
    own: list[NgramTable] = field(default_factory=list)
    own_scores: list[Tensor] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """(step, a copy of the model in TransformerLens), for `track`: it goes on when the next is asked for."""
        recipe = self.recipe
        model = recipe.build(self.text.d_vocab)
        optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, betas=(0.9, 0.98), weight_decay=0.01)
        windows = self.text.windows(recipe.context)
        draw = np.random.default_rng(recipe.seed)
        for step in range(recipe.steps + 1):
            if step in recipe.looked_at:
                self._look(model.eval())
                yield step, self._in_transformer_lens(model)
            if step == recipe.steps:
                return
            for group in optimizer.param_groups:  # a rise, then a linear fall
                group["lr"] = recipe.rate * min((step + 1) / 20, 1 - step / recipe.steps)
            rows = windows[torch.from_numpy(draw.integers(len(windows), size=recipe.batch))]
            mean_loss(model.train(), rows).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def _in_transformer_lens(self, model: nn.Module) -> TransformerBridge:
        frozen = copy.deepcopy(model).requires_grad_(False)
        return TransformerBridge.boot_transformers(
            str(TINYDOCS), hf_model=frozen, tokenizer=self.text.tokenizer, device="cpu", dtype=torch.float32
        )

    @torch.no_grad()
    def _look(self, model: nn.Module) -> None:
        held_out = self.text.windows(self.recipe.context, held_out=True)
        losses = [mean_loss(model, rows, "sum") for rows in held_out.split(self.recipe.batch)]
        self.nats.append(float(sum(losses)) / int((held_out[:, 1:] != BOS).sum()))
        total, seen = torch.zeros(self.text.d_vocab, self.text.d_vocab), torch.zeros(self.text.d_vocab)
        for rows in sample(self.text, self.recipe).split(self.recipe.batch):
            first = rows[:, :-1].flatten()
            total.index_add_(0, first, model(rows[:, :-1], use_cache=False).logits.softmax(-1).flatten(0, 1))
            seen += torch.bincount(first, minlength=len(seen))
        average = total.div_(seen.clamp_min(1)[:, None])
        self.own_scores.append(average[self.pairs[:, 0], self.pairs[:, 1]].double().log())
        best = average.mul_(self.unigram[:, None].float()).flatten().topk(self.n)
        ids = torch.stack([best.indices // len(seen), best.indices % len(seen)], dim=1)
        names = token_names(self.text.tokenizer, [ids])
        self.own.append(NgramTable.ranked(ids, best.values.log(), names=names, path="model"))


def sample(text: Text, recipe: Recipe) -> Tensor:
    """Windows of the training text, evenly spaced."""
    windows = text.windows(recipe.context)
    return windows[:: max(1, len(windows) // SAMPLED)]


def mean_loss(model: nn.Module, rows: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of what follows in windows `[window, context + 1]`; beginnings are not to be guessed."""
    targets = rows[:, 1:].masked_fill(rows[:, 1:] == BOS, IGNORED)
    logits = model(rows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def library() -> list[Path]:
    """The modules of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [file for file in sorted(root.rglob("*.py")) if not NOT_READ & set(file.relative_to(root).parts)]
