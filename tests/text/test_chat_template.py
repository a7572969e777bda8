"""What templates may read and what they may cost."""

from pathlib import Path

import pytest

from text.chat_template import ChatTemplate, ChatTemplateError, load_chat_template

ROLES = ("system", "user", "assistant", "user")
CHAT = [{"role": role, "content": f"words {i}"} for i, role in enumerate(ROLES)]
TEXT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}"
)
STRICT_PARTS = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] + '' }}{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}!{% endif %}{% endfor %}"
)
MIXED = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
SHOWN = "".join(f"<{role}>words {i}" for i, role in enumerate(ROLES))


@pytest.mark.parametrize(
    "source", [TEXT, PARTS, STRICT_PARTS, EITHER, MIXED],
    ids=["text", "parts", "strict-parts", "either", "mixed"],
)  # fmt: skip
def test_words_are_shown_in_the_form_that_the_template_reads(source: str) -> None:
    template = ChatTemplate(source, {})
    assert template.render(CHAT) == SHOWN
    assert template.unread_roles == frozenset()


@pytest.mark.parametrize("source", [TEXT, PARTS, EITHER], ids=["text", "parts", "either"])
def test_role_that_is_not_probed_has_the_users_form(source: str) -> None:
    text = ChatTemplate(source, {}).render([{"role": "tool", "content": "words"}])
    assert text == "<tool>words"


def test_template_without_system_turns_is_probed_without() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = ChatTemplate(refusing + PARTS, {})
    assert template.render(CHAT[1:]) == SHOWN.removeprefix("<system>words 0")
    with pytest.raises(ChatTemplateError, match="refuses this: no system"):
        template.render(CHAT)


def test_template_that_shows_no_user_is_refused() -> None:
    template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}", {})
    assert template.unread_roles == {"system", "user", "assistant"}
    with pytest.raises(ChatTemplateError, match="shows nothing of a user's message"):
        template.render(CHAT)


def test_role_that_is_not_shown_is_told_and_the_rest_rendered() -> None:
    source = (
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(source, {})
    assert template.unread_roles == {"system"}
    assert template.render(CHAT) == SHOWN.removeprefix("<system>words 0")


@pytest.mark.parametrize(
    "source", [[1, None], [{"name": "default"}], [{"template": TEXT}], 5, {"default": TEXT}]
)
def test_setting_that_holds_no_template_is_none(tmp_path: Path, source: object) -> None:
    assert load_chat_template(tmp_path, {"chat_template": source}, {}) is None


def test_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ChatTemplateError, match=r"chat_template.jinja: not UTF-8 text"):
        load_chat_template(tmp_path, {}, {})


def doubling(expression: str, start: str = "'abcdefgh'") -> str:
    """Return a template that makes something twice as large, 60 times."""
    return (
        f"{{% macro twice(x) %}}{{{{ x }}}}{{{{ x }}}}{{% endmacro %}}"
        f"{{% set n = namespace(x={start}) %}}"
        f"{{% for i in range(60) %}}{{% set n.x = {expression} %}}{{% endfor %}}{{{{ n.x }}}}"
    )


def nested(body: str) -> str:
    loop = "{% for a in range(100000) %}"
    return loop * 3 + body + "{% endfor %}" * 3


BIG = "{% set big = 'a' * 900000 %}{% set list = [0] * 90000 %}"
COSTLY = {
    "loops": nested(""),
    "filtered-loops": "{% for a in range(100000) if false %}{% endfor %}" * 20,
    "printed": nested("x" * 10_000),
    "recursive-loop": "{% for x in [0] recursive %}{{ loop([0, 0]) }}{% endfor %}",
    "recursive-macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(50) }}",
    "recursive-block": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat-constant": "{{ 'a' * 10000000000 }}",
    "repeat-left": "{{ 10**10 * 'a' }}",
    "repeat-list": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 2 ** 1000000000 }}",
    "square": doubling("n.x * n.x", "3"),
    "plus": doubling("n.x + n.x"),
    "concat": doubling("n.x ~ n.x"),
    "format": doubling("'%s%s' | format(n.x, n.x)"),
    "macro": doubling("twice(n.x)"),
    "lists": doubling("n.x + n.x", "[0]"),
    "nested-lists": doubling("[n.x, n.x]"),
    "nested-tuples": doubling("(n.x, n.x)"),
    "nested-dicts": doubling("{'a': n.x, 'b': n.x}"),
    "nested-calls": doubling("dict(a=n.x, b=n.x)"),
    "nested-namespaces": doubling("namespace(a=n.x, b=n.x)"),
    "width-filter": "{{ 'a' | center(10**9) }}",
    "width-constant": "{{ 'a' | center(1000000000) }}",
    "width-method": "{{ 'a'.ljust(10**9) }}",
    "width-percent": "{{ '%1000000000d' % 1 }}",
    "width-argument": "{{ '%*d' % (10**9, 1) }}",
    "width-format": "{{ '{:1000000000}'.format(1) }}",
    "width-format-argument": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "width-json": "{{ [1] | tojson(indent=10**9) }}",
    "width-indent": "{{ '\\n\\n' | indent(10**9) }}",
    "join-filter": BIG + "{{ list | join(big) }}",
    "join-method": BIG + "{{ big.join(list | map('string')) }}",
    "replace-filter": BIG + "{{ big | replace('', big) }}",
    "replace-method": BIG + "{{ big.replace('a', big) }}",
    "batch": "{{ [0] | batch(10**9, 0) | list | length }}",
    "slice": "{{ [0] | slice(10**9) | list | length }}",
    "map": "{{ range(100000) | map('center', 100000) | list | length }}",
    "shared-text": BIG + "{{ ([big] * 90000) | string | length }}",
    "search": BIG + nested("{{ 'b' in big }}"),
    "search-from-the-end": BIG + "{{ big.rfind('b' ~ big[:450000]) }}",
    "test": BIG + nested("{{ 1 is in list }}"),
    "select": BIG + nested("{{ [1] | select('in', list) | list }}"),
    "find": BIG + nested("{{ big.find('b') }}"),
    "copy": BIG + nested("{% set x = list[1:] %}"),
    "sorted-text": BIG + "{{ ([big] * 900) | sort | length }}",
    "sorted-selected-text": BIG + "{{ ([big] * 900) | select('string') | sort | length }}",
    "sorted-values": BIG + "{{ dict(a=[big] * 900).values() | sort | length }}",
    "largest-text": BIG + "{{ ([big] * 900) | max | length }}",
    "distinct-text": BIG + "{{ ([big] * 900) | unique | list | length }}",
    "grouped-text": BIG + "{{ ([{'a': big}] * 900) | groupby('a') | length }}",
    "case": BIG + nested("{% if big is lower %}{% endif %}"),
    "case-of-list": BIG + "{% if ([big] * 900) is lower %}{% endif %}",
    "compared-texts": BIG
    + "{% set a = [big] * 900 %}{% set b = [big ~ 'b'] * 900 %}"
    + "{{ a == b }}" * 4,
    "summed-lists": "{{ ([[1]] * 90000) | sum(start=[]) | length }}",
    "sum": nested("{{ range(100000) | sum }}"),
    "lipsum": "{{ lipsum(10**6) }}",
    "refund": "{% set x = (-10**12) | _spend %}" + nested(""),
    "mapped-refund": "{% set x = [-10**12] | map('_spend') | list %}" + nested(""),
}


@pytest.mark.parametrize("body", COSTLY.values(), ids=COSTLY)
def test_costly_template_is_refused(body: str) -> None:
    template = ChatTemplate(TEXT + body, {})
    with pytest.raises(ChatTemplateError, match="time or memory|recursion|undefined"):
        template.render([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + ")" * 5000 + " }}", "{% for a in [] %}" * 40 + "{% endfor %}" * 40],
    ids=["brackets", "loops"],
)
def test_template_nested_too_deeply_is_broken(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="chat template is broken"):
        ChatTemplate(source, {})


def test_long_conversation_is_within_the_budget() -> None:
    source = (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages[:] %}{{ '<' + m['role'] + '>' }}{% set c = m['content'] | trim %}"
        "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
        "{{ c ~ (messages | selectattr('role', 'equalto', 'system') | list | length) }}{% endfor %}"
    )
    messages = [{"role": ROLES[1 + i % 2], "content": "a longer text " * 30} for i in range(400)]
    text = ChatTemplate(source, {}).render(messages)
    assert text.count("a longer text") == 12_000


def test_long_message_is_within_the_budget() -> None:
    content = "x y\n" * 1_000_000
    source = TEXT.replace("m.content", "(m.content | trim).replace('y', 'z') | indent(2)")
    assert (
        ChatTemplate(source, {}).render([{"role": "user", "content": content}]).count("z") == 10**6
    )
