"""Trains tinydocs, the model that `tl_jets.load_tinydocs` loads, and measures it.

    python demos/tinydocs/train.py --cache DIR              # corpus, tokenizer, training; goes on where it was stopped
    python demos/tinydocs/train.py --cache DIR --export     # write the trained model into tl_jets/pretrained/tinydocs
    python demos/tinydocs/train.py --cache DIR --evaluate   # what is written there beside a Kneser-Ney bigram model

With `--code` all three are about tinycode (`tl_jets.load_tinycode`): tinydocs, trained on for `FINE_TUNING` steps on Python
source, with the same vocabulary.

The model is transformers' own `LlamaForCausalLM`: RMSNorm, rotary positions, SwiGLU, no biases, untied embeddings. It is
trained in float32 on windows of `N_CTX` tokens that all begin with `<s>` and then, at the beginning of a paragraph, with
text; so a short prompt looks like what it was trained on. Matrices within the layers are trained with Muon (Jordan et al.
2024), embeddings and norms with AdamW; the learning rate rises for `WARM_UP` steps, stays, and falls linearly to zero over
the second half; then it falls once more, from `MORE_RATE` of its peak.

The data of a step depend on the seed and the step alone, and a checkpoint holds the weights and the optimizers' state, so a
run that is killed and started again takes the same steps as one that was not.

**Held-out figure**: the pages that `corpus.py` holds out are cut into windows of at most `N_CTX` tokens, at paragraphs where
that is possible, each behind its own `<s>`; every token of them (text, line breaks between paragraphs, the end of a page) is
scored once, in nats, and averaged. The bigram model of `kneser_ney.py` is trained on the same training tokens and scores the
same tokens; it is given the true previous token even where a window begins.

Cost: three quarters of an hour on two cores, about 1 GB of memory. Needs torch 2.9 or newer (`torch.optim.Muon`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import corpus
import kneser_ney
import numpy as np
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

PRETRAINED = Path(__file__).resolve().parents[2] / "tl_jets" / "pretrained"
TINYDOCS, TINYCODE = PRETRAINED / "tinydocs", PRETRAINED / "tinycode"
D_VOCAB, N_CTX = 4096, 256
UNKNOWN, BOS, EOS = 0, 1, 2
IGNORED = -100  # a target that is not scored
WARM_UP = 50
MORE_RATE = 0.4
FINE_TUNING = {"steps": 0, "more_steps": 600}  # of a recipe: the second, lower rate alone


@dataclass(frozen=True)
class Recipe:
    """Everything that a run depends on, besides the corpus."""

    steps: int = 2000
    more_steps: int = 600  # once more, from a lower rate
    batch: int = 16
    muon_rate: float = 0.015
    adam_rate: float = 8e-3
    muon_decay: float = 0.1
    adam_decay: float = 0.01
    n_layers: int = 4
    d_model: int = 128
    d_mlp: int = 448
    n_heads: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """Pages as tokens: `<s> paragraph newline paragraph ... </s>`, one page after the other."""

    tokens: np.ndarray  # [pos]
    paragraph_starts: np.ndarray  # [paragraph], increasing

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, Tensor]:
        """Windows that begin with a random paragraph, and their next tokens: both `[batch, pos]`."""
        random = np.random.default_rng([recipe.seed, step])
        usable = self.paragraph_starts[self.paragraph_starts + N_CTX <= len(self.tokens)]
        starts = random.choice(usable, size=recipe.batch)
        windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(N_CTX)])
        inputs = torch.cat([torch.full((recipe.batch, 1), BOS), windows[:, :-1]], dim=1)
        return inputs, windows.masked_fill(windows == BOS, IGNORED)

    def windows(self) -> tuple[Tensor, Tensor]:
        """All tokens once, in windows that begin with a paragraph where possible: inputs, targets `[window, pos]`."""
        ends = [*self.paragraph_starts[1:], len(self.tokens)]
        rows: list[list[int]] = []
        row: list[int] = []
        for start, end in zip(self.paragraph_starts, ends, strict=True):
            piece = [token for token in self.tokens[start:end].tolist() if token != BOS]
            if len(row) + len(piece) > N_CTX - 1 or (row and row[-1] == EOS):
                rows.append(row)
                row = []
            row = row + piece
            while len(row) > N_CTX - 1:
                rows.append(row[: N_CTX - 1])
                row = row[N_CTX - 1 :]
        rows = [row for row in [*rows, row] if row]
        inputs = torch.full((len(rows), N_CTX), EOS)
        targets = torch.full((len(rows), N_CTX), IGNORED)
        for index, row in enumerate(rows):
            inputs[index, : len(row) + 1] = torch.tensor([BOS, *row])
            targets[index, : len(row)] = torch.tensor(row)
        return inputs, targets


def train_tokenizer(pages: list[corpus.Page]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of `D_VOCAB` tokens, trained on the training pages; it puts `<s>` before every text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for page in pages for text in page.paragraphs), trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, pages: list[corpus.Page]) -> Text:
    """The pages as tokens."""
    (newline,) = tokenizer.encode("\n", add_special_tokens=False).ids
    tokens: list[int] = []
    starts: list[int] = []
    for page in pages:
        tokens.append(BOS)
        for encoding in tokenizer.encode_batch(page.paragraphs, add_special_tokens=False):
            starts.append(len(tokens))
            tokens += [*encoding.ids, newline]
        tokens[-1] = EOS
    return Text(np.array(tokens, dtype=np.int64), np.array(starts))


def prepare(cache: Path, code: bool) -> tuple[Text, Text, tokenizers.Tokenizer, dict[str, Any]]:
    """Training text, held-out text, the tokenizer, and the corpus' provenance.

    The tokenizer of tinydocs is trained once and kept in the cache; tinycode takes the shipped one.
    """
    pages, provenance = (corpus.CODE if code else corpus.DOCS).load(cache)
    training, held_out = ([page for page in pages if page.held_out == part] for part in (False, True))
    kept = TINYDOCS / "tokenizer.json" if code else cache / "tokenizer.json"
    if not kept.is_file():
        _replace(kept, lambda path: train_tokenizer(training).save(str(path), pretty=False))
    tokenizer = tokenizers.Tokenizer.from_file(str(kept))
    return encode(tokenizer, training), encode(tokenizer, held_out), tokenizer, provenance


def build(recipe: Recipe) -> transformers.LlamaForCausalLM:
    """The untrained model."""
    config = transformers.LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=N_CTX,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.manual_seed(recipe.seed)
    return transformers.LlamaForCausalLM(config)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices within the layers, AdamW for embeddings, unembedding and norms."""
    inner = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and "layers" in name]
    others = [parameter for name, parameter in model.named_parameters() if parameter.ndim < 2 or "layers" not in name]
    return [
        torch.optim.Muon(inner, weight_decay=recipe.muon_decay, adjust_lr_fn="original"),
        torch.optim.AdamW(others, weight_decay=recipe.adam_decay, betas=(0.9, 0.98), fused=True),
    ]


def rate_factor(step: int, recipe: Recipe) -> float:
    """What the learning rates are multiplied with: a rise, a plateau, a linear fall to zero, and a lower one once more."""
    if step < recipe.steps:
        return min((step + 1) / WARM_UP, 1.0, 2.0 * (recipe.steps - step) / recipe.steps)
    since = step - recipe.steps
    return MORE_RATE * min((since + 1) / WARM_UP, (recipe.more_steps - since) / recipe.more_steps)


def train(
    recipe: Recipe, text: Text, checkpoint: Path, every: int, start: transformers.LlamaForCausalLM | None = None
) -> transformers.LlamaForCausalLM:
    """Train a new model, or `start`, or go on training from the checkpoint.

    Raises:
        ValueError: The checkpoint is of a run with another recipe.
    """
    model = (build(recipe) if start is None else start).train()
    trainers = optimizers(model, recipe)
    first = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] != asdict(recipe):
            raise ValueError(
                f"a run goes on with the recipe it began with; {checkpoint} has {saved['recipe']}, asked for was "
                f"{asdict(recipe)}; give it that recipe, or another --checkpoint"
            )
        model.load_state_dict(saved["model"])
        for trainer, state in zip(trainers, saved["optimizers"], strict=True):
            trainer.load_state_dict(state)
        first = saved["step"]
    smooth = None
    last = recipe.steps + recipe.more_steps
    progress = tqdm(range(first, last), initial=first, total=last, unit="step", mininterval=5)
    for step in progress:
        for trainer, peak in zip(trainers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            for group in trainer.param_groups:
                group["lr"] = peak * rate_factor(step, recipe)
        loss = mean_loss(model, *text.batch(recipe, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for trainer in trainers:
            trainer.step()
            trainer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        progress.set_postfix(nats=f"{smooth:.3f}", refresh=False)
        if (step + 1) % every == 0 or step + 1 == last:
            state = {
                "recipe": asdict(recipe),
                "step": step + 1,
                "model": model.state_dict(),
                "optimizers": [trainer.state_dict() for trainer in trainers],
            }
            _replace(checkpoint, lambda path, state=state: torch.save(state, path))
    return model.eval()


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of `targets` (`IGNORED` ones apart), both `[batch, pos]`."""
    logits = model(inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction, ignore_index=IGNORED
    )


@torch.no_grad()
def held_out_nats(model: nn.Module, text: Text) -> tuple[float, int]:
    """Mean loss a token of held-out text, and the number of tokens."""
    inputs, targets = text.windows()
    losses = [
        mean_loss(model, *rows, reduction="sum").double()
        for rows in tqdm(list(zip(inputs.split(16), targets.split(16), strict=True)), desc="held out", leave=False)
    ]
    count = int((targets != IGNORED).sum())
    return float(sum(losses)) / count, count


def baseline(training: Text, held_out: Text) -> float:
    """Nats a token of the Kneser-Ney bigram model, on the tokens that `held_out_nats` scores."""

    def pairs(text: Text) -> tuple[np.ndarray, np.ndarray]:
        scored = text.tokens[1:] != BOS
        return text.tokens[:-1][scored], text.tokens[1:][scored]

    bigrams = kneser_ney.KneserNey.fit(*pairs(training), D_VOCAB)
    return -float(bigrams.log_probability(*pairs(held_out)).mean())


def export(model: transformers.LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the model in float16 and its tokenizer as a directory that transformers loads."""
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # written for the owner alone
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": N_CTX, **names}
    settings["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader, or the next run, finds the old one or the whole new one."""
    temporary = path.with_name(path.name + ".part")
    write(temporary)
    os.replace(temporary, path)


def main() -> None:
    """Train, export or evaluate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=corpus.CACHE, help="corpus and checkpoint (default: %(default)s)")
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    action = parser.add_mutually_exclusive_group()
    parser.add_argument("--code", action="store_true", help="tinycode, not tinydocs")
    action.add_argument("--export", action="store_true", help="write the trained model into the package")
    action.add_argument("--evaluate", action="store_true", help="print the held-out figures of what is there")
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), help=f"default: {field.default}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cache, folder = options.cache.expanduser(), TINYCODE if options.code else TINYDOCS
    training, held_out, tokenizer, provenance = prepare(cache, options.code)
    if options.evaluate:
        figures: dict[str, float] = {}
        for shipped in [TINYDOCS, folder][not options.code :]:
            figures[shipped.name], count = held_out_nats(_shipped(shipped), held_out)
        figures["Kneser-Ney bigrams"] = baseline(training, held_out)
        figures["gain"] = figures["Kneser-Ney bigrams"] - figures[folder.name]
        print(json.dumps(provenance | {"held-out tokens": count, "nats per token": figures}, indent=1))
        return
    given = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    defaults = FINE_TUNING if options.code else {}
    recipe = Recipe(**defaults | {name: value for name, value in given.items() if value is not None})
    start = _shipped(TINYDOCS) if options.code else None
    model = train(recipe, training, cache / f"{folder.name}.pt", options.every, start)
    if options.export:
        export(model, tokenizer, folder)
    else:
        print(f"held out: {held_out_nats(model, held_out)[0]:.4f} nats a token")


def _shipped(folder: Path) -> transformers.LlamaForCausalLM:
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
