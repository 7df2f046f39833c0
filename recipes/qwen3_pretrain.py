r"""Pre-train a Qwen3 on text, from one process to many: from nothing, or on from weights that exist.

    python recipes/qwen3_pretrain.py --model DIR --data web/=0.8 code.parquet=0.2 --out runs/pretrain \
        --save-every 500 --resume auto
    torchrun --nproc_per_node 8 recipes/qwen3_pretrain.py --mesh dp=8 --optimizer muon \
        --model DIR --data web/ --out runs/pretrain

`--model` is a directory with config.json and tokenizer; its weights, if it has any, are where training
starts (`--from-scratch` draws new ones). Long documents are split, so that every token is predicted. Everything from
batch to update stands in `train_step`.
"""
import xtf
from xtf import cli, models
from xtf.run import Run

Flags = cli.PretrainFlags


def main(argv: list[str] | None = None) -> None:
    flags = cli.parse(Flags, argv, __doc__)
    with Run(flags) as run:
        if not run.finished:
            train(flags, run)


def train(flags: Flags, run: Run) -> None:
    model, cfg = cli.model(flags, models.qwen3, other="is not a Qwen3")
    tx, schedule, watch = cli.optimizer(flags, model.specs(cfg))  # AdamW, or Muon too, under WSD; what finds bad steps

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
