"""Record a whole small model with every form of recorder, and audit every tensor of it.

    python scripts/prove_recorders.py
    python scripts/prove_recorders.py --steps 50 --forms fused optax

Prints one line for each form: how many tensors replay bit for bit, and which do not.
Exit status: 0 all do; 1 some do not.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import jaxaudit

HIDDEN, VOCABULARY, CONTEXT = 8, 40, 12


def record_torch(folder: Path, steps: int, *, fused: bool) -> None:
    """Train a transformer of 28 tensors in bfloat16 with torch.optim.AdamW."""
    import torch
    from torch.nn import functional

    from jaxaudit.recorders.small_language_model import SmallLanguageModel

    torch.manual_seed(0)
    model = SmallLanguageModel(VOCABULARY, HIDDEN, CONTEXT).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=fused)
    with jaxaudit.record(optimizer, folder, model=model) as recorder:
        for _ in range(steps):
            tokens = torch.randint(VOCABULARY, (4, CONTEXT + 1))
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            recorder.note_loss(loss)
            optimizer.step()


def record_transformers(folder: Path, steps: int, *, autocast: bool) -> None:
    """Train a random GPT-2 of 28 tensors in the Trainer: float32 under autocast, or all bfloat16."""
    import torch
    import transformers

    class Text(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(index)
            tokens = torch.randint(VOCABULARY, (CONTEXT,), generator=generator)
            return {"input_ids": tokens, "labels": tokens}

    torch.manual_seed(0)
    sizes = {"n_positions": CONTEXT, "n_embd": HIDDEN, "n_layer": 2, "n_head": 2}
    special = {"bos_token_id": 0, "eos_token_id": 0, "loss_type": "ForCausalLM"}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **special)
    model = transformers.GPT2LMHeadModel(config)
    if not autocast:
        torch.nn.Module.to(model, torch.bfloat16)
    with tempfile.TemporaryDirectory() as output:
        arguments = transformers.TrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            weight_decay=0.1,
            bf16=autocast,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        callback = jaxaudit.RecordingCallback(folder)
        trainer = transformers.Trainer(model, arguments, train_dataset=Text(), callbacks=[callback])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()


def record_optax(folder: Path, steps: int, *, dtype: str = "float32") -> None:
    """Train a network of 20 arrays with optax.adamw behind a clip, step by step."""
    import jax
    import jax.numpy as jnp
    import optax

    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) / 3).astype(dtype)

    width = HIDDEN
    params = {
        "layers": [{"kernel": array(width, width), "bias": array(width)} for _ in range(9)],
        "head": {"kernel": array(width, 3), "bias": array(3)},
    }

    def loss_of(params, x):
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - 1) ** 2)

    numbers = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
    plain = optax.adamw(1e-2, weight_decay=0.1)
    adamw = jaxaudit.record_optax(plain, folder, hyperparameters=numbers)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    gradient, state = jax.jit(jax.value_and_grad(loss_of)), optimizer.init(params)
    for _ in range(steps):
        loss, grads = gradient(params, array(5, width))
        changes, state = optimizer.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, changes)
    adamw.close(params)


FORMS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "loop": ("torch-cpu-loop", lambda folder, n: record_torch(folder, n, fused=False)),
    "fused": ("torch-cpu-fused", lambda folder, n: record_torch(folder, n, fused=True)),
    "trainer-autocast": (
        "torch-cpu-fused",
        lambda folder, n: record_transformers(folder, n, autocast=True),
    ),
    "trainer-bfloat16": (
        "torch-cpu-fused",
        lambda folder, n: record_transformers(folder, n, autocast=False),
    ),
    "optax": ("optax", lambda folder, n: record_optax(folder, n)),
    "optax-bfloat16": ("optax", lambda folder, n: record_optax(folder, n, dtype="bfloat16")),
}


def audit_folder(folder: Path, arithmetic: str, every: int = 1) -> dict[str, int]:
    """Return the mismatches of each recorded tensor, or of one of every so many."""
    found = {}
    for path in sorted(folder.glob("*.safetensors"))[::every]:
        with jaxaudit.open_recording(path) as recording:
            dataset = jaxaudit.audit(recording, arithmetics=[arithmetic])
        found[path.stem] = int(dataset.mismatch_count.sum())
    return found


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    kind = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=kind)
    p.add_argument("--steps", metavar="N", type=int, default=200, help="of each run (%(default)s)")
    told = "of recorders (all)"
    p.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help=told)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Record and audit; 0 if every tensor replays bit for bit, 1 if not."""
    arguments = parser().parse_args(argv)
    wrong = 0
    for form in arguments.forms:
        arithmetic, make = FORMS[form]
        with tempfile.TemporaryDirectory() as parent:
            make(Path(parent) / "run", arguments.steps)
            found = audit_folder(Path(parent) / "run", arithmetic)
        different = {name: count for name, count in found.items() if count}
        wrong += len(different)
        print(f"{form}: {len(found) - len(different)} of {len(found)} tensors under {arithmetic}")
        for name, count in different.items():
            print(f"  {name}: {count} mismatches")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
