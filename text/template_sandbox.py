"""A Jinja sandbox with a bound on work: a model's files are input, too.

Jinja's own sandbox keeps a template from the machine, but not from spending its time and memory.
Here every rendering has a budget. A round of a loop or a call of a macro takes some of it, and so
does every value: what could make it large is paid for before it is made (operators, widths,
repetitions, text of lists), its own size after, output by its length.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MappingView, Sized
from functools import wraps
from typing import Any

from jinja2 import Template, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

# A unit is a character that is made; a chat of some hundred turns takes some ten thousand. A round
# of a loop and an item of a list take about a microsecond, a call takes ten.
_BASE_UNITS = 4_000_000
_UNITS_PER_CHAR = 50
_STEP_UNITS = 10
_CALL_UNITS = 100
_READ_UNITS = 1 / 16  # of a character that is searched or compared
_MAX_INTEGER_BITS = 4096
_MAX_WIDTH_DIGITS = 6
_SPEND, _MADE, _READ, _PRINTED = "_spend", "_made", "_read", "_printed"
_TEXT_FILTERS = {
    "dictsort", "e", "escape", "forceescape", "format", "groupby", "join", "max", "min", "sort",
    "string", "tojson", "unique", "urlencode",
}  # fmt: skip
# Slow or large whatever they are given, and of no use in a chat.
_REMOVED_FILTERS = {"pprint", "striptags", "urlize", "wordwrap", "xmlattr"}
_REMOVED_METHODS = {
    "encode", "expandtabs", "format_map", "from_bytes", "striptags", "to_bytes", "translate",
    "unescape",
}  # fmt: skip
_READING_TESTS = {
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le",
    "lessthan", "lower", "lt", "ne", "upper",
}  # fmt: skip
_SEARCHES_FROM_THE_END = {"rfind", "rindex", "rpartition", "rsplit"}


class BudgetError(ValueError):
    """A template takes more work than its rendering may."""

    def __init__(self) -> None:
        super().__init__("it takes too much time or memory")


class _GenerationBlock(Extension):
    """Accept `{% generation %}`, which marks text for training, as a plain block."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates whose rendering costs at most what `give` has granted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: Mapping[str, Callable[..., Any]]) -> None:
        """Prepare.

        Args:
            filters: by name, beside Jinja's own.
        """
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, loopcontrols],
            finalize=self._printed,
        )
        self._local = threading.local()
        del self.globals["lipsum"]
        for name, function in {**self.filters, **filters}.items():
            self.filters[name] = self._priced(name, function)
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        for name in _READING_TESTS:
            self.tests[name] = self._priced_test(self.tests[name])
        # With a context, so that jinja does not try them on constants when it compiles.
        self.filters[_SPEND] = pass_context(lambda _, units: self._spend(max(units, 0)))
        self.filters[_MADE] = pass_context(lambda _, value: self._made(value))
        self.filters[_PRINTED] = pass_context(lambda _, value: self._printed(value))
        self.filters[_READ] = pass_context(lambda _, value: self._read(value))

    def compile_bounded(self, source: str) -> Template:
        """Return the template of a source, whose rounds and values are paid for.

        Raises:
            TemplateError: the source is no template.
        """
        self.give(len(source))  # jinja tries filters on constants when it compiles
        tree = self.parse(source)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block))):
            _count_rounds(node)
        _wrap_children(tree)
        return self.from_string(tree)

    def give(self, num_chars: int) -> None:
        """Grant this thread's next rendering its budget.

        Args:
            num_chars: length of what is rendered.
        """
        self._local.units = _BASE_UNITS + _UNITS_PER_CHAR * num_chars

    def _spend(self, units: int) -> bool:
        self._local.units -= units
        if self._local.units < 0:
            raise BudgetError
        return True

    def _weigh(self, value: object, char_units: float) -> int:
        """Price what is nested in a value: its items, and the characters of its text.

        Args:
            value: any.
            char_units: price of a character.

        Raises:
            BudgetError: it is over the budget.
        """
        limit, total, pending = self._local.units, 0.0, [value]
        while pending:
            item = pending.pop()
            total += _STEP_UNITS
            if isinstance(item, str):
                total += len(item) * char_units
            elif isinstance(item, int):
                total += item.bit_length() / 3 * char_units
            elif isinstance(item, Mapping):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                pending += item
            elif isinstance(item, range):
                total += _STEP_UNITS * len(item)
            elif isinstance(item, Namespace):
                pending.append(getattr(item, "_Namespace__attrs"))  # noqa: B009
            if total + _STEP_UNITS * len(pending) > limit:
                raise BudgetError
        return int(total)

    def _size(self, value: Any) -> int:
        return len(value) if isinstance(value, str) else self._weigh(value, 0)

    def _made(self, value: Any) -> Any:
        self._spend(self._size(value))
        return value

    def _printed(self, value: Any) -> Any:
        self._spend(len(value) if isinstance(value, str) else self._weigh(value, 1))
        return value

    def _read(self, value: Any) -> Any:
        if isinstance(value, str):
            self._spend(int(len(value) * _READ_UNITS))
        elif not isinstance(value, Undefined | int | float | None):
            self._spend(self._weigh(value, _READ_UNITS))
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator that can make large values, see `SandboxedEnvironment`."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            self._spend(len(left) + len(right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if (bits[0] * abs(right) if operator == "**" else sum(bits)) > _MAX_INTEGER_BITS:
                raise BudgetError
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(value, float):
                    self._spend(self._size(value) * max(times, 1))
        elif operator == "%" and isinstance(left, str):
            self._price_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "+":
            self._made(left)
            self._made(right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call an object of a template, see `SandboxedEnvironment`."""
        __self._spend(_CALL_UNITS)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            if method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
            __self._price_text(method.__name__, owner, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        return result if isinstance(__obj, Macro) else __self._made(result)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Tell whether a template may use an attribute, see `SandboxedEnvironment`."""
        return attr not in _REMOVED_METHODS and super().is_safe_attribute(obj, attr, value)

    def _priced(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter so that what it makes is paid for."""
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def priced(*args: Any, **kwargs: Any) -> Any:
            value = args[skip]
            if isinstance(value, Iterator | MappingView) or (
                name == "join" and not isinstance(value, str)
            ):
                value = list(args[skip])
                args = (*args[:skip], value, *args[skip + 1 :])
            self._price_text(name, value, (*args[skip + 1 :], *kwargs.values()))
            return self._made(function(*args, **kwargs))

        return priced

    def _priced_test(self, function: Any) -> Callable[..., bool]:
        def priced(*args: Any) -> bool:
            for value in args:
                self._read(value)
            return bool(function(*args))

        return priced

    def _price_text(self, name: str, value: Any, given: tuple[Any, ...]) -> None:
        """Pay for what a filter, or a method of a string, reads and may make of it."""
        numbers = sum(abs(number) for number in given if isinstance(number, int))
        if name == "format":
            self._price_format(str(value), given)
        elif name == "join":
            parts = [value, *given]
            count = sum(len(part) for part in parts if isinstance(part, list))
            self._spend(self._weigh(parts, 1) + count * _longest(parts))
        elif name == "replace":
            old = given[0] if given and isinstance(given[0], str) else ""
            self._spend((str(value).count(old) + 1) * _longest(given[1:]))
        elif name == "indent":
            self._spend((str(value).count("\n") + 1) * (numbers + _longest(given)))
        elif name in _SEARCHES_FROM_THE_END:
            self._spend(int(len(value) * _longest(given) * _READ_UNITS))
        elif name == "tojson":
            self._spend(self._weigh(value, 1) * (1 + numbers))
        elif name == "sum" and any(isinstance(start, list | tuple) for start in given):
            self._spend(len(list(value)) * self._weigh(value, 0))  # each sum is a copy
        elif name in ("batch", "slice", "center", "ljust", "rjust", "zfill"):
            self._spend(numbers)
        if isinstance(value, str):
            self._read(value)
        elif name in _TEXT_FILTERS:
            self._spend(self._weigh(value, 1))
        elif isinstance(value, Sized):
            self._spend(_STEP_UNITS * len(value))

    def _price_format(self, text: str, given: tuple[Any, ...]) -> None:
        """Pay for a format, whose fields may each be as wide as its largest number says."""
        runs = re.findall("[0-9]+", text)
        if any(len(run) > _MAX_WIDTH_DIGITS for run in runs):
            raise BudgetError
        widths = [int(run) for run in runs] + [abs(n) for n in given if isinstance(n, int)]
        size = max(widths, default=0) + self._weigh(given, 1)
        self._spend((1 + text.count("%") + text.count("{")) * size)


def _count_rounds(node: nodes.Node) -> None:
    """Make a loop, macro or block pay for each of its rounds and for the text they print."""
    assert isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block)
    chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
    node.body.insert(0, nodes.ExprStmt(_filter(_SPEND, nodes.Const(_STEP_UNITS + chars))))
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = nodes.And(_filter(_SPEND, nodes.Const(_STEP_UNITS)), node.test)


def _wrap_children(node: nodes.Node) -> None:
    """Make values that are built, and those that are searched or compared, pay for themselves."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_wrap(child) if isinstance(child, nodes.Node) else child for child in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _wrap(value))


def _wrap(node: nodes.Node) -> nodes.Node:
    _wrap_children(node)
    if isinstance(node, nodes.Concat):
        node.nodes = [_filter(_PRINTED, part) for part in node.nodes]
    if isinstance(node, nodes.Operand) and not isinstance(node.expr, nodes.Const):
        node.expr = _filter(_READ, node.expr)
    is_built = isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    )
    is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    return _filter(_MADE, node) if is_built or is_slice else node


def _filter(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


def _longest(values: Iterable[Any]) -> int:
    return max((len(value) for value in values if isinstance(value, str)), default=0)
