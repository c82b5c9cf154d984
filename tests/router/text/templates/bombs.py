"""Templates whose work or text is out of all proportion to their length."""

from collections.abc import Mapping

BOMBS: Mapping[str, str] = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}"
    "{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "caller": "{% macro f() %}{{ caller() }}{% endmacro %}{% for a in range(99999) %}"
    "{% for b in range(99999) %}{% call f() %}{% endcall %}{% endfor %}{% endfor %}",
    "lists": "{% for a in range(99999) %}{% set b = range(99999) | list %}{% endfor %}",
    "map and sum": "{{ range(99999) | map('string') | map('length') | sum }}"
    "{% for a in range(9999) %}{{ range(99999) | map('int') | map('abs') | sum }}{% endfor %}",
    "select in": "{{ range(99999) | select('in', range(99999) | list) | list | length }}",
    "sort": "{% for a in range(9999) %}{{ range(99999) | sort(reverse=true) | first }}{% endfor %}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list | length }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "center": "{{ 'x' | center(10000000000) | length }}",
    "indent": "{{ 'x' | indent(10000000000, first=true) | length }}",
    "format": "{{ '%10000000000d' | format(1) | length }}",
    "percent": "{{ ('%10000000000d' % 1) | length }}",
    "str.format": "{{ '{:10000000000}'.format(1) | length }}",
    "str.center": "{{ 'x'.center(10000000000) | length }}",
    "str.zfill": "{{ 'x'.zfill(10000000000) | length }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) | length }}",
    "replace": "{% set ns = namespace(x='x') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x | replace('x', 'xxxx') %}{% endfor %}{{ ns.x | length }}",
    "str.replace": "{% set ns = namespace(x='x') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x.replace('', ns.x) %}{% endfor %}{{ ns.x | length }}",
    "join": "{% set ns = namespace(x='xx') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x | join(ns.x) %}{% endfor %}{{ ns.x | length }}",
    "~": "{% set ns = namespace(x='x') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
    "+": "{% set ns = namespace(x='x') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "+ of lists": "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
    "set block": "{% set ns = namespace(x='x') %}{% for a in range(99) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}{{ ns.x | length }}",
    "text of shared lists": "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "tojson of shared lists": "{% set ns = namespace(x={}) %}{% for a in range(99) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x | tojson }}",
    "shared lists compared": "{% set ns = namespace(x=[1], y=[1]) %}{% for a in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "shared arguments": "{% macro f() %}{% if varargs | string | length < 10 ** 30 %}"
    "{{ f(varargs, varargs) }}{% endif %}{% endmacro %}{{ f(1) }}",
    "numbers": "{% set ns = namespace(x=3) %}{% for a in range(99) %}"
    "{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x > 1 }}",
    "round": "{{ 1 | round(1000000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=100000000) | length }}",
    "date": "{{ strftime_now('%01000000000d') | length }}",
    "json indent": "{{ {'a': [1]} | tojson(indent=1000000000) | length }}",
    "words": "{{ ('a ' * 9999999) | wordwrap(1) | wordcount }}",
    "template": "{% for a in range(99999) %}{% for b in range(9999) %}"
    + "x" * 9999
    + "{% endfor %}"
    "{% endfor %}",
}
