"""How reports look: one style sheet, for light and dark screens, narrow ones, and paper."""

STYLE = """
:root {
  --ground: #ffffff; --raised: #f6f7f8; --ink: #1b1f24; --quiet: #59616b; --rule: #dfe2e6; --link: #1f5fbf;
  --c0: #1f5fbf; --c1: #b3541e; --c2: #1b7f5c; --c3: #8a3fa0; --c4: #8f6a00; --c5: #b0305c; --c6: #40707a; --c7: #5b5b5b;
  --good: #1b7f5c; --bad: #b0413e; --note: #fff6df; --note-edge: #c98a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171a; --raised: #1c2024; --ink: #e7e9ec; --quiet: #a3abb5; --rule: #31373e; --link: #8ab4ff;
    --c0: #7fb0ff; --c1: #f0a070; --c2: #63cfa5; --c3: #d29be6; --c4: #d9b44a; --c5: #f28cb1; --c6: #86c3cf; --c7: #b8b8b8;
    --good: #63cfa5; --bad: #f08a86; --note: #2b2615; --note-edge: #d9b44a;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 76rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
a { color: var(--link); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--ground); padding: .5rem 1rem; }
h1 small { font-weight: 400; font-size: 1.25rem; letter-spacing: 0; color: var(--quiet); display: block; margin-top: .25rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.015em; font-weight: 650; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; font-weight: 650; margin: 0 0 .75rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 1.75rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
.quiet, figcaption small, caption { color: var(--quiet); }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
header > .over { color: var(--quiet); font-size: .875rem; margin: 0 0 .35rem; }
nav { border-block: 1px solid var(--rule); margin: 1.75rem 0 0; font-size: .875rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; list-style: none; margin: 0; padding: .55rem 0; }
nav a { text-decoration: none; display: inline-block; padding: .15rem 0; }
nav a:hover { text-decoration: underline; }
section { margin: 2.75rem 0 0; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--quiet); font-size: .8125rem; }
.headline { display: flex; flex-wrap: wrap; align-items: end; gap: 1.5rem 3.5rem; margin: 1.75rem 0 0; }
.headline .big { font-size: 3.5rem; line-height: 1; font-weight: 650; letter-spacing: -.03em; }
.headline .what { color: var(--quiet); margin: .5rem 0 0; font-size: .875rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem 2.25rem; margin: 0; }
.tiles div { min-width: 5.5rem; }
.tiles dt { color: var(--quiet); font-size: .8125rem; }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 550; }
.facts { display: grid; grid-template-columns: minmax(6rem, 10rem) 1fr; gap: .3rem 1.25rem; margin: 0; }
.facts dt { color: var(--quiet); }
.facts dd { margin: 0; }
.note { background: var(--note); border-left: 3px solid var(--note-edge); padding: .75rem 1rem; margin: 1.75rem 0 0; }
.note ul { margin: .25rem 0 0; padding-left: 1.2rem; }
.note p { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(19.5rem, 100%), 1fr)); gap: 1.75rem 2.25rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .35rem; font-size: .9375rem; }
figcaption small { font-weight: 400; font-size: .8125rem; }
.keys { list-style: none; margin: 0 0 .25rem; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .8125rem; }
.keys svg { width: 22px; height: 8px; margin-right: .35rem; vertical-align: middle; }
figure > svg { display: block; width: 100%; height: auto; max-width: 26rem; }
svg text { font-size: 11px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-opacity: .28; stroke-width: 1; }
svg .band { stroke: none; fill-opacity: .16; }
svg .even { stroke: var(--quiet); stroke-dasharray: 3 4; fill: none; }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); }
.c4 { --c: var(--c4); } .c5 { --c: var(--c5); } .c6 { --c: var(--c6); } .c7 { --c: var(--c7); }
svg .line, svg .whisker { stroke: var(--c); } svg .dot, svg .band, svg .bar { fill: var(--c); }
svg .whisker { stroke-width: 2; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll + details, .facts + details { margin-top: .75rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.4; }
caption { text-align: left; padding: 0 0 .5rem; font-size: .8125rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(46rem, calc(100vw - 2rem)); }
th, td { overflow-wrap: break-word; text-align: left; padding: .4rem 1rem .4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--quiet); font-weight: 500; font-size: .8125rem; vertical-align: bottom; white-space: nowrap; }
tbody th, td:not(.n) { max-width: 14rem; }
tbody th { font-weight: 500; min-width: 7rem; }
.told td:not(.n) { max-width: 40rem; }
table:not(.matrix) td:not(.n) { min-width: 8rem; }
.n { text-align: right; white-space: nowrap; }
td svg { display: block; }
.meter { display: inline-block; width: 3rem; height: .4rem; margin-right: .5rem; background: var(--rule); vertical-align: middle; }
.meter i { display: block; height: 100%; width: calc(var(--v) * 100%); background: var(--c0); }
.matrix th, .matrix td { padding: .2rem .3rem; border: 1px solid var(--rule); text-align: right; font-size: .75rem; min-width: 1.9rem; }
.matrix tbody th { text-align: left; white-space: nowrap; max-width: 14rem; min-width: 6rem; overflow: hidden; text-overflow: ellipsis; }
.matrix .right { background: color-mix(in srgb, var(--c2) calc(var(--v) * 45%), transparent); }
.matrix .wrong { background: color-mix(in srgb, var(--c1) calc(8% + var(--v) * 40%), transparent); }
.matrix .none { color: var(--quiet); }
details { margin: .75rem 0 0; }
summary { cursor: pointer; color: var(--link); font-size: .875rem; width: fit-content; }
details > :not(summary) { margin-top: .75rem; }
pre { background: var(--raised); padding: .9rem 1rem; overflow-x: auto; white-space: pre; overflow-wrap: normal; margin: 0; }
.rows { list-style: none; margin: 0; padding: 0; }
.rows > li { border-top: 1px solid var(--rule); padding: .9rem 0; }
.rows .where { color: var(--quiet); font-size: .8125rem; margin: 0 0 .3rem; max-width: none; }
.rows .text { margin: 0 0 .4rem; max-width: 52rem; white-space: pre-line; }
.rows.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 100%), 1fr)); gap: 1.5rem 1.25rem; }
.rows.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.rows.grid > li { border: 0; padding: 0; min-width: 0; }
.rows img { display: block; width: 100%; height: 10.5rem; object-fit: contain; background: var(--raised); margin-bottom: .5rem; }
.rows img.sound { height: 6.5rem; object-fit: fill; image-rendering: auto; margin: 0; }
.rows img.small { image-rendering: pixelated; }
.rows audio { display: block; width: 100%; height: 2.25rem; margin: .35rem 0 .5rem; }
.said { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .75rem; margin: 0; font-size: .9375rem; }
.said dt { color: var(--quiet); font-size: .8125rem; line-height: 1.75; }
.said dd { margin: 0; white-space: pre-line; min-width: 0; }
.said .right::before { content: "\\2713\\00a0"; color: var(--good); }
.said .wrong::before { content: "\\2717\\00a0"; color: var(--bad); }
mark { color: inherit; border-radius: 2px; padding: .05em .15em; background: color-mix(in srgb, var(--c) 22%, transparent);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.why { margin: 0 0 1rem; font-size: 1.125rem; line-height: 1.8; max-width: 52rem; white-space: pre-line; }
.why mark { background: color-mix(in srgb, var(--c) calc(8% + var(--v) * 52%), transparent); }
figure.why { font-size: 1rem; line-height: 1.55; white-space: normal; }
.why img { display: block; width: 100%; max-width: 26rem; height: auto; }
mark small { color: var(--quiet); font-size: .75em; margin-left: .35em; }
@media (max-width: 34rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; } .headline .big { font-size: 2.75rem; }
  .facts { grid-template-columns: 1fr; gap: 0; } .facts dd { margin-bottom: .5rem; }
}
@media print {
  body { max-width: none; padding: 0; } nav, .skip { display: none; } section, figure, li { break-inside: avoid; }
}
""".strip()
