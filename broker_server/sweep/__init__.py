"""Many simulations of one federation: settings crossed with each other and with seeds.

`runs` checks what is to run, `running` runs it, `grid` reads a sweep file, `figures` and `results` say what came of it,
`tracking` hands it to other programs.
"""
