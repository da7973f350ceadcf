"""Chat templates that reach for Python's insides, or never end."""

from __future__ import annotations

import json
from collections.abc import Iterator

import toy
from hostile_inputs import CHAT, Input, both, edit, merge, put

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('__cla'~'ss__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('CANARY','w') }}",
    "{{ range.__class__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict(a=1).__class__.__base__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ messages.append({'role':'user','content':'x'}) }}",
    "{{ messages[0].update({'role':'x'}) }}",
    "{{ messages[0].clear() }}",
    "{{ messages.pop() }}",
    "{% set x = messages.sort %}{{ x() }}",
    "{{ '{0.__class__.__base__.__subclasses__}'.format('') }}",
    "{{ '{0[__class__]}'.format('') }}",
    "{{ ('{0.__cla'+'ss__}').format('') }}",
    "{{ 'a'.format_map({'a': ''.__class__}) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}'.format]|map('attr','__call__')|list }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|groupby('__class__') }}",
    "{{ ['']|sum(attribute='__class__') }}",
    "{{ ['']|selectattr('__class__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ ''|string|attr('format')('x') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch CANARY') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ strftime_now('%'*1000) }}",
    "{{ tojson.__globals__ }}",
    "{{ (messages|tojson).__class__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns.x }}",
    "{% set ns = namespace() %}{{ ns.__init__.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% include '../../outside/bait' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% from 'os' import system %}{{ system('touch CANARY') }}",
    "{% extends '/etc/passwd' %}",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ url_for.__globals__.os.environ }}",
    "{{ import_module('os').system('touch CANARY') }}",
    "{{ open('CANARY','w') }}{{ exec('x') }}{{ eval('1') }}{{ __import__('os') }}",
    "{% generation %}{{ caller.__globals__ }}{% endgeneration %}",
    "{% generation %}{{ self.environment }}{% endgeneration %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}{{ m.__func__ }}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ (lambda: 1)() }}",
    "{% for k in [].__iter__.__self__.__class__.mro() %}{{ k }}{% endfor %}",
    "{{ (messages|random).__class__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ 1.0.hex.__self__.__class__.fromhex }}",
    "{{ (1).to_bytes.__objclass__ }}",
    "{% do messages.append(1) %}",
    "{% debug %}",
    "{{ environment.globals }}{{ self.blocks }}",
    "{% autoescape true %}{{ ''|e|attr('__class__') }}{% endautoescape %}",
    "{% set x %}{{ ''.__class__ }}{% endset %}{{ x }}",
]
NESTED = "{% for a in range(99999) %}"
BOMBS = [
    NESTED * 4 + "{% endfor %}" * 4,
    NESTED * 2 + "x" + "{% endfor %}" * 2,
    NESTED + "{{ 'x' * 9999 }}{% endfor %}",
    "{{ 'x' * 10**9 }}",
    "{{ 'x' * 10**12 }}",
    "{{ [0] * 10**9 }}",
    "{{ ('x' * 10**8)|length }}",
    "{{ ('x' * 3*10**7)|upper|lower|title|length }}",
    "{{ 9 ** 9 ** 9 ** 9 }}",
    "{{ (2 ** 10**8)|string|length }}",
    "{{ 7 ** (10**7) % 10 }}",
    "{{ range(10**9)|list }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:0999999999d}'.format(1) }}",
    "{{ '{0:>{1}}'.format('x', 10**9) }}",
    "{{ 'x'.ljust(10**9) }}",
    "{{ 'x'.center(10**9)|length }}",
    "{{ 'x'|center(10**9) }}",
    "{{ 'x'|indent(10**9) }}",
    "{{ ('a'*10**6)|replace('a', 'b'*10**6) }}",
    "{{ 'x'|wordwrap(1) }}" * 3000,
    "{{ lipsum(n=10**7) }}",
    "{{ lipsum(n=1, max=10**8, min=10**8 - 1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% set ns = namespace(x='x') %}" + NESTED + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[]) %}"
    + NESTED
    + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
    "{{ 1" + " + 1" * 20000 + " }}",
    "{{ [" * 3000 + "]" * 3000,
    "{{ 'x'|" + "|".join(["upper"] * 5000) + " }}",
    "{{ messages[0]" + "[0:9]" * 5000 + " }}",
    "{{ '" + "\\" * 100001 + "' }}",
    "{#" * 10000,
    "{%" * 10000,
    "{{ 'a'|urlize(" + "9" * 5000 + ") }}",
    "{{ ('a' * 200000 ~ '@')|urlize }}",
    "{{ ('http://' ~ 'a.' * 200000)|urlize }}",
    "{{ ('<' * 100000)|striptags }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ (range(90000)|list)|batch(1)|list|tojson(indent=9999) }}",
    "{{ cycler(*range(10**8)) }}",
    "{{ dict([[1, 2]] * 10**8) }}",
    "{{ [1] * 5 * 10**8 == [1] * 5 * 10**8 }}",
    "{{ 'x' in ['y'] * 10**9 }}",
    "{% raw %}" + "x" * 10**6 + "{% endraw %}",
]


def templates() -> Iterator[Input]:
    for number, text in enumerate(ESCAPES):
        make = edit("model/tokenizer_config.json", chat_template=text + toy.CHAT_TEMPLATE)
        if number % 3 == 1:
            make = merge(data={"chat_template": text + toy.CHAT_TEMPLATE})
        if number % 3 == 2:  # a file of its own, which wins over the config's
            make = put("model/chat_template.jinja", text + toy.CHAT_TEMPLATE)
        yield Input(f"template {text}", make, ends="either")
    for text in BOMBS:
        make = edit("model/tokenizer_config.json", chat_template=text)
        yield Input(f"template {text}", make, says=("train.jsonl",))
    for text in (ESCAPES[6], ESCAPES[7], BOMBS[0], BOMBS[3]):
        data = put("train.jsonl", "".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(9)))
        make = both(edit("model/tokenizer_config.json", chat_template=text), data)
        args = ("init", "model", "train.jsonl", "-o", "run/new.yaml")
        yield Input(f"init {text}", both(make, lambda f: (f / "run").mkdir()), args=args)
    for text in (ESCAPES[7], BOMBS[0], "{{ messages[0].content }}"):  # as data, it is only text
        rows = [{"prompt": f"{i}", "completion": f"{i}{text[:40]}"} for i in range(9)]
        make = put("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        yield Input(f"data {text}", make, ends="inert")
    several = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "x", "template": ESCAPES[7]}]
    make = edit("model/tokenizer_config.json", chat_template=several)
    yield Input("several templates, none of them the default", make, says=("no default",))
    for odd in (17, ["{{"], {"default": 3}, [[]], {"a": {"b": 1}}, True):
        make = edit("model/tokenizer_config.json", chat_template=odd)
        yield Input(f"a template that is {odd!r}", make, ends="either")
