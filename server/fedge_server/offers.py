"""What a coordinator asks of sites for a run, as one message: the same for all of them, for as long as it lasts."""

from __future__ import annotations

from fedge.privacy.terms import Terms
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.strategy import WorkKind
from fedge.vector import Layout
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import encode_kind, encode_layout, encode_terms, encode_work
from fedge.wire.secure import encode_sum_terms


def offer_of(
    run_id: str,
    config: RunConfig,
    layout: Layout,
    *,
    kind: WorkKind,
    strategy: str,
    secure: SumTerms | None,
) -> pb.Offer:
    """The offer of a run; `strategy` is how its strategy shows itself."""
    terms = Terms.of(config)
    return pb.Offer(
        run_id=run_id,
        name=config.name,
        task=config.task,
        strategy=strategy,
        rounds=config.rounds,
        seed=config.seed,
        work=encode_work(config.work),
        layout=encode_layout(layout),
        clip=config.privacy.clip,
        privacy=encode_terms(terms) if terms is not None else None,
        cohort=config.cohort.needed,
        kind=encode_kind(kind),
        strategy_name=config.strategy.name,
        secure_aggregation=encode_sum_terms(secure) if secure is not None else None,
    )
