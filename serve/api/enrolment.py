"""Requests that take part in an experiment: which arm they get, and what is noted of it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError

from decoding import ParameterError
from serve.api.context import ApiContext, Experiments
from serve.api.errors import ApiError
from serve.api.generation import Generation
from serve.api.resolve import build_arm, split_model
from serve.api.schema import ChatBody, ComparisonArm, CompletionBody, GenerationBody, SamplingFields
from serve.experiments.database import DatabaseError
from serve.experiments.exposures import Exposure
from serve.experiments.plan import Experiment, ExperimentArm, PlanError

_LOG = logging.getLogger("proa.api")
_PROMPT_CHARS = 1000

Body = TypeVar("Body", bound=GenerationBody)


@dataclass(slots=True)
class Enrolment:
    """A request's part in an experiment.

    Attributes:
        experiments: of the server.
        experiment, arms: what it takes part in, and whose answers it gets.
        unit: what tells the client from others.
        answer_id: of the answer.
        started_s: on the monotonic clock.
        is_noted: its end has been kept.
    """

    experiments: Experiments
    experiment: Experiment
    arms: Sequence[ExperimentArm]
    unit: str
    answer_id: str
    started_s: float
    is_noted: bool = False

    @property
    def headers(self) -> Mapping[str, str]:
        """What the response says of it."""
        labels = ", ".join(arm.label for arm in self.arms)
        return {"X-Proa-Experiment": self.experiment.name, "X-Proa-Arm": labels}

    async def note(self, generation: Generation) -> None:
        """Keep what was shown; what goes wrong is logged: the answer matters more."""
        self.is_noted = True
        exposures = self._exposures(generation, None)
        try:
            await asyncio.to_thread(self.experiments.store.record, exposures)
        except DatabaseError as error:
            _LOG.error("an exposure cannot be kept: %s", error)

    def note_failure(self, generation: Generation, reason: str) -> None:
        """Keep that there was no answer, without waiting for the disk."""
        if not self.is_noted:
            self.is_noted = True
            exposures = self._exposures(generation, reason)
            work = asyncio.get_running_loop().run_in_executor(
                None, self.experiments.store.record, exposures
            )
            work.add_done_callback(_log_failure)

    def _exposures(self, generation: Generation, reason: str | None) -> list[Exposure]:
        now_s = time.monotonic()
        first_s = generation.first_output_s
        exposures = []
        for index, arm in enumerate(self.arms):
            # Of one arm, all answers that were asked for.
            usage = generation.usage() if len(self.arms) == 1 else generation.choice_usage(index)
            exposures.append(
                Exposure(
                    id=self.answer_id,
                    experiment=self.experiment.name,
                    arm=arm.label,
                    unit=self.unit,
                    created=time.time(),
                    first_token_s=None if first_s is None else first_s - self.started_s,
                    seconds=now_s - self.started_s,
                    prompt_tokens=int(str(usage["prompt_tokens"])),
                    completion_tokens=int(str(usage["completion_tokens"])),
                    finish=reason or generation.finish_reason(index) or "stop",
                )
            )
        return exposures


def _log_failure(work: "asyncio.Future[None]") -> None:
    if not work.cancelled() and (error := work.exception()) is not None:
        _LOG.error("an exposure cannot be kept: %s", error)


OnEnd = Callable[[], Awaitable[None]] | None


def watch(
    enrolment: Enrolment | None, generation: Generation
) -> tuple[OnEnd, Mapping[str, str] | None]:
    """Note how a generation ends.

    Returns:
        What is to be awaited when it has its answers, and headers for the response.
    """
    if enrolment is None:
        return None, None
    generation.on_failure = partial(enrolment.note_failure, generation)
    return partial(enrolment.note, generation), enrolment.headers


def enrol(context: ApiContext, body: Body, answer_id: str) -> tuple[Body, Enrolment | None]:
    """Return a request as its arm has it, if its model is an experiment.

    Args:
        context: of the application.
        body: of the request.
        answer_id: of the answer.

    Returns:
        The body, with the arm's model and fields; and what is to be noted, or None.

    Raises:
        ApiError: the experiment compares, so it has no single answer.
    """
    experiments = context.experiments
    experiment = None if experiments is None else experiments.plan.get(body.model or "")
    if experiment is None or experiments is None:
        return body, None
    if experiment.unit == "paired":
        raise ApiError(
            f"{experiment.name!r} is a paired experiment: ask it through /v1/compare with "
            "experiment in place of arms.",
            param="model",
            code="invalid_value",
        )
    unit = _unit(experiment, body, answer_id)
    arm = experiment.assign(unit)
    fields = _arm_fields(arm)
    own = {name: value for name, value in fields if value is not None}
    enrolment = Enrolment(experiments, experiment, (arm,), unit, answer_id, time.monotonic())
    return body.model_copy(update={**own, "model": arm.model}), enrolment


def enrol_paired(context: ApiContext, name: str, answer_id: str) -> Enrolment:
    """Return a comparison's part in an experiment.

    Raises:
        ApiError: there is no such experiment, or it does not compare.
    """
    experiments = context.experiments
    experiment = None if experiments is None else experiments.plan.get(name)
    if experiment is None or experiments is None:
        raise ApiError(
            "There is no such experiment; /v1/experiments lists them.", status=404,
            param="experiment", code="experiment_not_found",
        )  # fmt: skip
    if experiment.unit != "paired":
        raise ApiError(
            f"experiment: {name!r} gives each {experiment.unit} one arm: ask it by its name as the "
            "model.",
            param="experiment",
            code="invalid_value",
        )
    return Enrolment(
        experiments, experiment, experiment.arms, answer_id, answer_id, time.monotonic()
    )


def comparison_arms(experiment: Experiment) -> list[ComparisonArm]:
    """Return the arms of an experiment as a comparison has them."""
    return [_validated(arm) for arm in experiment.arms]


def _unit(experiment: Experiment, body: GenerationBody, answer_id: str) -> str:
    """Return what tells a client from others; one that says nothing is a new one each time."""
    who = body.safety_identifier or body.user or ""
    if experiment.unit == "request":
        return answer_id
    if experiment.unit == "conversation":
        return f"{who}\0{_beginning(body)}"
    return who or answer_id


def _beginning(body: GenerationBody) -> str:
    """Return what stays the same while a conversation goes on."""
    if isinstance(body, ChatBody):
        first: list[str] = []
        for message in body.messages:
            first.append(f"{message.role}\0{message.content}")
            if message.role == "user":
                break
        return "\0".join(first)
    assert isinstance(body, CompletionBody)
    return str(body.prompt)[:_PROMPT_CHARS]


def _arm_fields(arm: ExperimentArm) -> list[tuple[str, Any]]:
    valid = _validated(arm)
    return [(name, getattr(valid, name)) for name in SamplingFields.model_fields]


def _validated(arm: ExperimentArm) -> ComparisonArm:
    return ComparisonArm.model_validate({**arm.fields, "model": arm.model, "label": arm.label})


def check_experiments(context: ApiContext, plan: Mapping[str, Experiment]) -> None:
    """Check that the server can do what experiments want.

    Raises:
        PlanError: an experiment is named like a model, or an arm has an unknown model or field, or
            a value out of range.
    """
    base = context.settings.model_id
    for experiment in plan.values():
        if experiment.name == base:
            raise PlanError(f"experiment {experiment.name!r} is named like the model")
        for arm in experiment.arms:
            place = f"experiment {experiment.name!r}, arm {arm.label!r}"
            try:
                fields = _validated(arm)
                if fields.seed is not None:
                    raise PlanError(f"{place}: seed: one seed for all would make one answer of all")
                choice = split_model(arm.model, context)
                build_arm(fields, choice, context, max_tokens=fields.max_tokens or 1)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                name = ".".join(map(str, first["loc"]))
                raise PlanError(f"{place}: {name}: {first['msg']}") from None
            except (ApiError, ParameterError) as error:
                raise PlanError(f"{place}: {error.param}: {error}") from None
