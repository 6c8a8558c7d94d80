"""What the commands say of themselves: descriptions, examples, and one legend each, for --help and below the tables."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

DESCRIPTION = """\
What jets say about a TransformerLens model: a transformer as a sum of terms.

  tl-jets lens       what every layer says about the next token, and the
                     prediction as a weighted sum of components
  tl-jets paths      the largest paths from input to output, and what
                     ablation says of them
  tl-jets flow       through which components the effect of an ablation, or
                     of another prompt, reaches the answer
  tl-jets ngrams     what the weights say after every token of the
                     vocabulary, without a corpus
  tl-jets jacobian   the model as an exact linear map at one prompt: what
                     each token gives to the answer
  tl-jets explore    all of this for one prompt, as a page to click through

Each prints tables with their controls, and a legend; --json and --html write
the same to files. A model is a local Hugging Face directory or a name on the
hub; without --model it is the small one that comes along.
"""
EPILOG = """\
Options without a command are those of `lens`; `tl-jets COMMAND --help` tells
what a command's numbers mean.

example:
  tl-jets paths --model ./my-model --prompt "Once upon a" --ablate

exit status: 0 fine; 2 what was asked for cannot be done; 1 an unexpected
error; 130 interrupted; 141 the output's reader went away.
"""
TOKEN_HELP = "as text (' is', or \u00b7is as the tables write it) or as id:317"

DESCRIPTIONS = {
    "lens": """\
What every layer's stream says about the next token (the iterative lens, a row
for every layer and order), and the prediction as a weighted sum of components
(the joint lens), with controls.
""",
    "paths": """\
A transformer whose norm scales, attention patterns and gates are frozen at
one prompt is, exactly, the sum of its paths from input to output. This prints
the largest of them, and the sums of all paths through each component, by what
they give to the answer's logit.
""",
    "flow": """\
Ablate components, or run another prompt: the answer's logit moves. Its change
is carried from stage to stage by exact mean gradients between the two runs,
so that at every layer flows add up to it. This prints how much of it passes
through each component, and whether the sum closes. --joint divides the change
over the ablated components instead.
""",
    "ngrams": """\
A path that mixes no positions is a function of one token. Evaluated on the
whole vocabulary it is a table of bi-grams: exact, from the weights alone. A
head gives skip-trigrams: how much a query token looks at a key token, and what
the head then writes of the key.

paths (--path):
  direct            the embedding, decoded at once
  mlps              all MLPs, without attention
  3_mlp             one MLP alone, of the embedding
  1_mlp > 3_mlp     one MLP of another's output
  L0H1 > L2H3       heads, as if each attended to that token alone
""",
    "jacobian": """\
Freeze every norm scale, attention pattern and gate at one prompt, and the
model is a linear map J of its token embeddings, plus a bias, with the same
output. This prints what each token gives through J, and the directions that J
passes on most.
""",
    "explore": """\
Writes a page of one prompt that opens offline in a browser (--html, by default
explore.html): the best token of every layer at every position; click a cell for
its tokens and control, the rank of the answer by layer, what components add to
it, and the token's bi-grams. --ablate adds an ablation's flow.
""",
}
# A key may name a variant of its entry, "score|logit": only the part before the bar is shown.
LEGENDS: dict[str, dict[str, str]] = {
    "lens": {
        "verdict": "A layer says something of its own if its KL is below that of nine in ten of 8 controls, and below their "
        "median by a fifth. The answer leads where order 0 has it first.",
        "order": "The final norm's Taylor polynomial of this degree around the layer's stream, taken at the final stream, then "
        "unembedded. Order 0 is the logit lens. Of higher orders a part is the model's own final stream.",
        "[token]": "Borrowed: the answer comes from that part; what is the layer's own says something else.",
        "borrowed": "How much of the logits is that part, by length. -own: the layer's own reading is subtracted (alpha < 0), "
        "as it is at order 1 wherever the stream has grown much since.",
        "rho": "Distance from the layer's stream to the final one, in lengths of the layer's. At 1 or more the series "
        "diverges: higher orders then are no better than lower ones.",
        "joint": "Weights on the components, summing to 1, that bring the sum of their jets closest to the model's logits. Its "
        "control: random components of equal lengths and angles, weighted in the same way.",
        "detached": "The final norm keeps the scale that it has at the final stream, so that logits are sums: direct logit "
        "attribution. A layer's row is what its stream so far gives; nothing is borrowed. The joint lens is exact (KL 0), and "
        "says nothing by that: its parts do.",
        "effect": "What the component adds to the logit of the model's answer, or of a target, beyond the mean of the "
        "vocabulary. Effects sum to the model's own.",
        "KL (control)": "KL(model || lens) in nats, 0 is best. In round brackets: the same for one random vector of the "
        "layer's length and angle to the final stream, which has that much of the answer and nothing else of the layer; a KL "
        "no better is no evidence about the layer. One draw scatters by tens of percent: compare averages.",
        "rank": "Of the answers to --prompts among all tokens, 0 is the best: median over prompts, and its 95% interval. In round "
        "brackets: the rank of the answer to another prompt, which a layer that has read nothing ranks as well.",
        "leads": "Share of prompts whose answer is a layer's best token from that layer on. In round brackets: the same for "
        "random vectors and the model's own answer.",
        "remainder": "Length of what is missing from the model's logits, relative to theirs. top-1 %: how often both have the "
        "same best token.",
        "not here": "What a component gives through later ones: `tl-jets paths`. What the model would lose without it: an "
        "ablation, `tl-jets paths --ablate`.",
        "softcap": "Logits and effects are before the model's final softcap; KL and ranks are its own.",
    },
    "paths": {
        "effect": "What a path adds to the token's logit beyond the mean of the vocabulary, with norm scales, attention "
        "patterns and gates frozen at this prompt (all effects sum to the model's).",
        "effect|jet": "What a path adds to the token's logit beyond the mean of the vocabulary. A jet of order 1 or more "
        "carries the model's own stream into every path, so that most decode to its answer whatever they pass through.",
        "path": "A source (embed, or the constant of a step), then the steps that it passes through; ln_final is the final "
        "norm. A step that is not named is passed by.",
        "control": "Whether the model would miss a path is another question, which --ablate asks it.",
        "fall": "How far the centered logit falls if what arrives along this path is taken away, and everything responds. "
        "confirmed: within a factor of two of the effect; refuted: less than a tenth, or of the other sign; else partly. "
        "Random paths of comparable effect are the control.",
        "fall, zeroed": "How far it falls if all that the component writes becomes zero (KL: how far the whole answer "
        "moves, in nats). A component's paths overlap with those of others: their effects do not sum to the model.",
        "softcap": "Effects and ablations are of logits before the model's final softcap; KL is after it.",
    },
    "flow": {
        "flow": "How much of the effect passes through what the component writes, from wherever it came. Components in series "
        "carry the same effect one after another: flows of one layer's streams add up, not those of all.",
        "share": "The flow over the effect. Beyond 100% other components carry the opposite.",
        "direct": "The part that goes straight to the final norm; all components' sum is the effect.",
        "largest at": "The position of the write with the largest flow.",
        "gap": "What all flows miss of the effect, the numerical error of the mean gradients. Above 1% the effect is open, and "
        "no flows are shown.",
        "path patching": "Control, with --check: what changes if the component alone is restored in the intervened run, and if "
        "it alone is moved in the clean one. Where the two differ, flow is another quantity: compare ranks.",
        "share|joint": "The component's part of the joint effect: its gradient, averaged while all are ablated by degrees "
        "(Aumann-Shapley). Shares sum to the effect.",
        "alone": "The effect of ablating it alone. Its control is the joint ablation of random sets of the same size and layers.",
        "gradient": "Its gradient in the clean run times its change: attribution patching.",
        "effect": "The change of the logit, less the mean change of the vocabulary.",
        "softcap": "Logits are before the model's final softcap.",
    },
    "ngrams": {
        "attention|vocab": "How much the query looks at the key: log softmax over the whole vocabulary as keys, nats.",
        "attention|pair": "How much the query looks at the key in a context of these two tokens, as a logarithm, nats.",
        "attention|none": "The raw query-key score, which a key bias shifts without changing any output.",
        "log prob": "Log-probability of the output, decoded from what the head writes of the key alone, nats.",
        "score|trigram": "Their sum. These are exactly the best of all V^3 triples.",
        "score|centered": "Logit of the second token after the first, less its mean over the vocabulary.",
        "score|lift": "Log-probability of the second token after the first, less that of the softmax of the path's mean logits, "
        "in nats: what the first token adds.",
        "score|logit": "Logit of the second token after the first, after the model's own softcap or scale.",
        "score|logprob": "Log-probability of the second token after the first, in nats: exact over the whole vocabulary, from "
        "the weights alone.",
        "log normalizer": "Of the first token's row: its logits less this are the scores, nats.",
        "direct": "The embedding, decoded at once. mlps: all MLPs without attention. 3_mlp: one MLP of the embedding.",
        "control": "No text was read, and tokens that training rarely met score as high as others. tl_jets.studies compares "
        "with counts of a text (compare_with_counts), and ablates the component (ablation_check).",
        "\u00b7": "A space that belongs to the token; \ufffd is a part of a character.",
    },
    "jacobian": {
        "error": "What J e + bias misses of the model's own output, relative: rounding only. The ordinary Jacobian (of the "
        "model as it responds) is the control: it does not add up to the output.",
        "effect": "What the token gives to the logit beyond the mean of the vocabulary. Tokens and bias sum to the model's.",
        "share": "Of the output: the projection on it; shares sum to 100%. norm: length; parts may cancel.",
        "raises most": "Best tokens of what the position gives, read by the final norm and the unembedding.",
        "value": "J makes the direction of the input so many times as long, and turns it into that of the output. (47%): the "
        "part of the direction that is at this position. At another prompt J is another map.",
        "softcap": "Logits are those before the model's final softcap.",
    },
    "explore": {
        "color": "The rank of the model's own answer on a logarithmic scale, or KL against that of a random vector of the same "
        "length and angle, or the share of the cell that is the model's own final stream.",
        "[token]": "Borrowed: the answer comes from the model's own final stream; what is the layer's own says something else.",
        "components": "What each adds to the logit of the model's answer beyond the vocabulary's mean; they sum to it.",
        "flow": "How much of the ablation's effect passes through what a component writes; open ones explain nothing.",
    },
}
EPILOGS = {
    "lens": """\
examples:
  tl-jets lens
  tl-jets lens --model ./my-model --prompt "The Eiffel Tower is in" --order 2
  tl-jets lens --linearize detached --granularity head   # direct attribution
  tl-jets lens --model ./my-model --prompts prompts.txt --order 0
  tl-jets lens --target " reported" --json - | jq .iterative.labels
""",
    "paths": """\
examples:
  tl-jets paths
  tl-jets paths --prompt "This function is available on Unix and" --ablate
  tl-jets paths --granularity head --through L1H2 --top 10
  tl-jets paths --target " raised" --linearize jet --order 0
  tl-jets paths --model ./my-model --prompts prompts.txt --ablate

--through and --avoiding take steps (3_mlp, L3H2), sources (embed, 3_mlp_bias)
or kinds (attn, mlp, head, block, bias), --sources sources or the kind bias;
repeat them for more.
More than --max-paths detached paths are searched by a beam (greedy: large
paths may be missed; the effects shown are exact all the same).
""",
    "flow": """\
examples:
  tl-jets flow --ablate 0_mlp
  tl-jets flow --model ./my-model --prompt "The Eiffel Tower is in" --ablate 8_mlp --check 5
  tl-jets flow --prompt "The file is closed in" --corrupted "The file is opened in"
  tl-jets flow --joint L0H1 L1H2 L2H3 --keep-bos

Where an ablation moves an attention sink, as the first position is in most
models, many passes are needed; --keep-bos asks the milder question.
""",
    "ngrams": """\
examples:
  tl-jets ngrams
  tl-jets ngrams --path mlps --top-k 1000 --save mlps.parquet
  tl-jets ngrams --token " Victor"
  tl-jets ngrams --trigrams 1 --head 0 --head 2
  tl-jets ngrams --trigrams 1 --top-k 1000 --save heads/

cost: about V^2 d_model multiply-adds a path (GPT-2 small: a quarter of a minute
on two cores), a fraction of that a head.
""",
    "explore": """\
examples:
  tl-jets explore
  tl-jets explore --prompt "This function is available on Unix and" --ablate 0_mlp --keep-bos
  tl-jets explore --model ./my-model --prompt "Once upon a" --order 2 --html page.html
""",
    "jacobian": """\
examples:
  tl-jets jacobian
  tl-jets jacobian --prompt "The file is opened in" --svd 6
  tl-jets jacobian --output 2_pre                # map to the stream before layer 2
  tl-jets jacobian --wrt 3_mid --output 3_mlp_out --svd 4      # one MLP

What the model does elsewhere J does not tell: it is exact at this prompt only.
""",
}


def epilog(command: str) -> str:
    """What follows the options in a command's --help."""
    return f"A FILE of - is standard output; the tables are then left out.\n\n{EPILOGS[command]}"


def legend(command: str, *keys: str) -> dict[str, str]:
    """The chosen entries of a command's legend; all of them without keys."""
    entries = LEGENDS[command]
    return {key.split("|")[0]: entries[key] for key in keys or entries}


def description(command: str) -> str:
    """The description of a command's --help, with its whole legend."""
    entries: Mapping[str, str] = LEGENDS[command]
    width = max(len(key.split("|")[0]) for key in entries) + 4
    lines = [
        textwrap.fill(text, 79, initial_indent=f"  {key.split('|')[0]}".ljust(width), subsequent_indent=" " * width)
        for key, text in entries.items()
    ]
    return "\n".join([DESCRIPTIONS[command], "what the numbers mean:", *lines])
