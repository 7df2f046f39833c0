"""Pre-train a Qwen3 on text, from one process to many: from nothing, or on from weights that exist.

    python recipes/qwen3_pretrain.py --model DIR --data web/=0.8 code.parquet=0.2 --out runs/pretrain --save-every 500
    --resume auto torchrun --nproc_per_node 8 recipes/qwen3_pretrain.py --mesh dp=8 --optimizer muon --model DIR --data
    web/ --out runs/pretrain

`--model` is a directory with config.json and tokenizer; its weights, if it has any, are where training starts
(`--from-scratch` draws new ones). Long documents are split, so that every token is predicted. Everything from batch to
update stands in `train_step`.
"""
from pathlib import Path
from typing import Literal

import torch

import xtf
from xtf import cli, layout, models
from xtf.data import eval_batches
from xtf.optim import adamw, chain, clip_by_global_norm, guard, hidden_matrix, muon, partition, schedules
from xtf.run import Run


class Flags(cli.Flags, kw_only=True, frozen=True):
    """Flags of pre-training: those of fine-tuning, and these."""
    lr: float = 3e-4
    """Peak learning rate: of a warm-up, a plateau, and a decay to nothing (WSD)."""
    decay: float = 0.2
    """The fraction of --steps in which the rate falls."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon takes the layers' matrices at the same rate; adamw the rest, or all."""
    from_scratch: bool = False
    """Draw the parameters even if --model has weights."""


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(Flags, argv, __doc__)
    with Run(flags) as run:
        if not run.finished:
            train(flags, run)


def train(flags: Flags, run: Run) -> None:
    model, cfg = models.from_hf(flags.model)
    if model is not models.qwen3:
        raise ValueError(f"--model {flags.model}: {model.__name__} is not a Qwen3")
    schedule = schedules.wsd(flags.lr, flags.steps, flags.warmup, flags.decay)
    tx = adamw(schedule, weight_decay=flags.weight_decay, mask=lambda path, leaf: leaf.ndim > 1, moments=flags.moments)
    if flags.optimizer == "muon":
        matrices = muon(schedule, weight_decay=flags.weight_decay)
        tx = partition({"muon": matrices, "adamw": tx}, lambda path, leaf: "muon" if hidden_matrix(path, leaf)
                       else "adamw")
    tx, watch = chain(clip_by_global_norm(flags.clip), tx), guard()

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = ops.total(batch.loss_mask.sum()).clamp(min=1)  # over the whole global batch, beforehand

        def share(params, batch, ops):  # this rank's, this micro-batch's part of the loss
            return model.loss(params, batch, cfg, ops) / num_tokens
        loss, grads = xtf.microbatch(xtf.value_and_grad(share), len(batch.input_ids))(state.params, batch, ops)
        norm = ops.norm(grads)
        ok, seen = watch.check(state.extra, loss, norm)  # False: the step is skipped, on the device
        updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
        return state.apply(updates, opt, seen), {"loss": loss, "grad_norm": norm, "lr": schedule(state.step),
                                                 **watch.metrics(seen)}

    def eval_step(state, batch, ops=xtf.LOCAL):
        with torch.no_grad():
            return ops.total(torch.stack([model.loss(state.params, batch, cfg, ops), batch.loss_mask.sum()]).double())

    step = xtf.shard(train_step, *cli.transforms(flags), mesh=run.mesh, specs=model.specs(cfg))
    if flags.dry_run:
        return cli.say(layout.table(step.specs, step.layout))
    evaluate = xtf.shard(eval_step, *cli.transforms(flags, training=False), mesh=run.mesh, specs=model.specs(cfg))

    tokenizer = cli.tokenizer(flags)
    loader, held_out = cli.data(flags, tokenizer, cfg.vocab_size)
    if flags.show_batch:
        return cli.show(loader.step(0), tokenizer)
    if flags.from_scratch or not any(Path(flags.model).glob("*.safetensors")):
        params = cli.on_device(xtf.init(step.specs, flags.seed, step.layout))
    else:
        params = cli.load(flags, step, model.names(cfg))
    state = xtf.TrainState.create(params, tx.init(params), watch.init(), flags.seed)
    state = run.begin(state, loader, model, cfg)  # the newest checkpoint's, if --resume finds one

    def held_out_loss(state):
        batches = eval_batches(held_out, flags.seq_len, loader.packs_per_step, run.mesh)
        nll, tokens = torch.stack([evaluate(state, cli.on_device(batch)) for batch in batches]).sum(0).tolist()
        return nll / max(tokens, 1)

    if held_out and run.first == 0:
        run.evaluation(0, held_out_loss(state))
    for i, batch in run.steps():
        state, metrics = step(state, batch)
        run.log(i, metrics)
        if held_out and run.evaluates(i):
            run.evaluation(i, held_out_loss(state))
        run.save(i, state)
    run.finish(state.params)


if __name__ == "__main__":
    cli.run(main)
