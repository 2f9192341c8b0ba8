"""Style sheet of the pages: light, dark, narrow and printed."""

# Eight colors that those who see few colors tell apart (Okabe and Ito 2008), the yellow
# darkened on white. The dark ones are lighter.
_LIGHT = """
--paper:#ffffff;--panel:#f6f7f9;--ink:#1c2128;--quiet:#59636e;--faint:#8b949e;
--line:#d1d9e0;--link:#0b57d0;--bad:#b42318;--badpaper:#fef3f2;
--c1:#0072b2;--c2:#d55e00;--c3:#00835f;--c4:#b4508f;--c5:#8a6d00;--c6:#2a8fc7;
--c7:#1c2128;--c8:#7a5cc8;
"""
_DARK = """
--paper:#0f1318;--panel:#171c23;--ink:#e6edf3;--quiet:#9aa4af;--faint:#727d89;
--line:#30363d;--link:#7cb7ff;--bad:#ff9a8f;--badpaper:#2d1715;
--c1:#58b0e8;--c2:#f58a42;--c3:#35c796;--c4:#e08fc0;--c5:#e0c341;--c6:#8bd0f5;
--c7:#e6edf3;--c8:#b49cf2;
"""
STYLE_SHEET = (
    ":root{color-scheme:light dark;"
    + _LIGHT
    + "}\n@media screen and (prefers-color-scheme:dark){:root{"
    + _DARK
    + "}}"
    + """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:1.5rem clamp(1rem,3vw,2.5rem) 4rem;
background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .25rem}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-top:1rem;
border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.5rem 0 .5rem}
header p,figcaption,.note,caption{color:var(--quiet)}
p{max-width:75ch;margin:.5rem 0}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;padding:0;margin:1rem 0 0;
list-style:none}
.problem{color:var(--bad);background:var(--badpaper);padding:.5rem .75rem;
border-left:3px solid var(--bad);max-width:none}
.cards{display:grid;gap:.75rem;padding:0;margin:1.5rem 0;
grid-template-columns:repeat(4,1fr)}
@media (max-width:700px){.cards{grid-template-columns:1fr 1fr}}
.cards div{background:var(--panel);border-radius:8px;padding:.75rem 1rem}
.cards dt{color:var(--quiet);font-size:.85rem}
.cards dd{margin:0;font-size:1.4rem;font-variant-numeric:tabular-nums}
.cards dd small{display:block;font-size:.8rem;color:var(--quiet)}
.charts{display:grid;gap:1.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
figure{margin:0;min-width:0;break-inside:avoid}
figure svg{display:block;width:100%;height:auto}
figure svg text{font-family:system-ui,sans-serif !important}
figcaption{font-size:.875rem;margin-top:.25rem}
figcaption strong{color:var(--ink)}
.tiles{display:grid;gap:1rem .9rem;margin:.75rem 0;
grid-template-columns:repeat(auto-fill,minmax(140px,1fr))}
.neighbors{grid-template-columns:repeat(7,minmax(0,1fr));gap:.5rem;max-width:840px}
.neighbors .tile:first-child{border-right:2px solid var(--line);padding-right:.5rem}
.tile img{display:block;width:100%;max-width:128px;height:auto}
.tile strong{display:block;font-size:.9rem;margin:.25rem 0}
.tile small{color:var(--quiet);display:block}
.tile ol{list-style:none;max-width:128px;margin:0;padding:0;
font-size:.8rem;line-height:1.35}
.tile .right{font-weight:600}
.tile i{display:block;height:4px;background:var(--c1);min-width:1px}
.tile .right i{background:var(--c3)}
.filters{display:block;width:100%;max-width:760px;height:auto;image-rendering:pixelated}
.wide{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-size:.9rem}
caption{text-align:left;padding-bottom:.35rem}
th,td{text-align:left;vertical-align:top;padding:.3rem .9rem .3rem 0;
border-bottom:1px solid var(--line)}
th{font-weight:600}
th,td{overflow-wrap:break-word}
td{max-width:42rem}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
summary{cursor:pointer;padding:.35rem 0}
a:focus-visible,summary:focus-visible,.wide:focus-visible{outline:2px solid var(--link);
outline-offset:2px}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}
.wide{overflow:visible}.charts{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;display:block}
tr,.tile,.cards div{break-inside:avoid}h2,h3,summary{break-after:avoid}
.problem,.cards div{border:1px solid #999}}
"""
)
