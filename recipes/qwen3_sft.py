"""Fine-tune a Qwen3 on chats, from one process to many.

    python recipes/qwen3_sft.py --model DIR --data chats.jsonl --out runs/sft --save-every 100 --resume auto
    torchrun --nproc_per_node 4 recipes/qwen3_sft.py --mesh dp=2,sp=2 --model DIR --data chats.jsonl --out runs/sft

Everything from batch to update stands in `train_step`; what the ranks do is in the `shard(...)` call.
"""
import xtf
from xtf import cli, models
from xtf.run import Run


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(cli.Flags, argv, __doc__)
    with Run(flags) as run:
        if not run.finished:
            train(flags, run)


def train(flags: cli.Flags, run: Run) -> None:
    model, cfg = cli.model(flags, models.qwen3, other="is not a Qwen3; use recipes/llama_sft.py")
    tx, schedule, watch = cli.optimizer(flags, model.specs(cfg))  # AdamW under a cosine; what finds bad steps

    def train_step(state, batch, ops=xtf.LOCAL):
        num_tokens = batch.loss_tokens(ops)  # over the whole global batch, beforehand

        def share(params, batch, ops):  # this rank's, this micro-batch's part of the loss
            return model.loss(params, batch, cfg, ops) / num_tokens
        loss, grads = xtf.microbatch(xtf.value_and_grad(share), len(batch.input_ids))(state.params, batch, ops)
        norm = ops.norm(grads)
        ok, seen = watch.check(state.extra, loss, norm)  # False: the step is skipped, on the device
        updates, opt = tx.update(grads, state.opt, state.params, ops, norm=norm, ok=ok)
        return state.apply(updates, opt, seen), {"loss": loss, "grad_norm": norm, "lr": schedule(state.taken),
                                                 **watch.metrics(seen)}

    step = xtf.shard(train_step, *cli.transforms(flags), mesh=run.mesh, specs=model.specs(cfg))
    if cli.shown(flags, step, cfg.vocab_size):  # --dry-run, --show-batch
        return
    loader, held_out = cli.data(flags, cfg.vocab_size)
    params = cli.load(flags, step, model.names(cfg))
    state = xtf.TrainState.create(params, tx.init(params), watch.init(), flags.seed)
    state = run.begin(state, loader, model, cfg, held_out)  # the newest checkpoint's, if --resume finds one

    for i, batch in run.steps():
        state, metrics = step(state, batch)
        run.log(i, metrics)
        run.evaluate(i, state)
        run.save(i, state)
    run.finish(state.params)


if __name__ == "__main__":
    cli.run(main)
