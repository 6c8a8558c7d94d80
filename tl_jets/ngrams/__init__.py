"""Jet n-grams: tables of n-grams over the whole vocabulary, computed from a model's weights without a corpus.

Example:
    >>> import tl_jets as tj
    >>> table = jet_bigrams(tj.load_tinydocs(), "mlps", top_k=20)
    >>> table["Victor"].to_dataframe()["token_2"].tolist()
    [' Stinner']
"""

from tl_jets.ngrams.bigrams import bigram_job, bigram_log_normalizers, jet_bigrams, jet_bigrams_by_path
from tl_jets.ngrams.fingerprints import fingerprint
from tl_jets.ngrams.induction import induction_table
from tl_jets.ngrams.jobs import Job, sweep
from tl_jets.ngrams.streams import VocabularyStreams
from tl_jets.ngrams.tables import NgramTable, side_by_side
from tl_jets.ngrams.trigrams import jet_trigrams, trigram_job, trigram_scores
from tl_jets.ngrams.vocabulary import UntrainedTokens, untrained_tokens

__all__ = [
    "Job",
    "NgramTable",
    "UntrainedTokens",
    "VocabularyStreams",
    "bigram_job",
    "bigram_log_normalizers",
    "fingerprint",
    "induction_table",
    "jet_bigrams",
    "jet_bigrams_by_path",
    "jet_trigrams",
    "side_by_side",
    "sweep",
    "trigram_job",
    "trigram_scores",
    "untrained_tokens",
]
