"""The look of a sweep's page, and the few lines that sort and search its table of tasks. Nothing is fetched."""

CSS = """
:root { color-scheme: light dark; --page: #fbfaf8; --card: #ffffff; --ink: #22262b; --soft: #666d75; --rule: #e4e2dd;
  --up: #2c7a6b; --down: #b4553f; --even: #8a9099; --waiting: #c9c6bf;
  --p0: #35607f; --p1: #6f93a8; --p2: #c08a3e; --p3: #2c7a6b; --p4: #9a9388; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --card: #1e2125; --ink: #e3e5e8; --soft: #9aa1a9;
  --rule: #30343a; --up: #5cb8a4; --down: #e08a70; --even: #8a9099; --waiting: #4a4f56;
  --p0: #5d8fb3; --p1: #89adc2; --p2: #d3a45f; --p3: #4ea391; --p4: #7d776d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; font-weight: 650; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; font-weight: 650; margin: 48px 0 12px; }
h3 { font-size: 15px; font-weight: 600; margin: 24px 0 8px; }
p, li { max-width: 78ch; } p.soft, .note { color: var(--soft); } .note { font-size: 13px; }
ul.said { padding-left: 18px; } ul.said li { margin: 4px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px; margin: 24px 0 12px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 24px; font-weight: 620; line-height: 1.25; } .card span { color: var(--soft);
  font-size: 13px; display: block; } .card b.up { color: var(--up); } .card b.down { color: var(--down); }
.states { display: flex; height: 10px; border-radius: 5px; overflow: hidden; gap: 2px; margin: 0 0 20px; }
.states i { display: block; } .done { background: var(--up); } .failed { background: var(--down); }
.waiting { background: var(--waiting); }
.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tall { max-height: 640px; overflow-y: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { padding: 7px 10px; text-align: left; vertical-align: top; } td.r, th.r { text-align: right; }
td.r { white-space: nowrap; }
th { color: var(--soft); font-weight: 550; border-bottom: 1px solid var(--rule); background: var(--card); }
tr + tr td { border-top: 1px solid var(--rule); } tbody tr:hover td { background: var(--page); }
.tall th { position: sticky; top: 0; } th button { all: unset; cursor: pointer; }
th button:focus-visible, input:focus-visible, summary:focus-visible {
  outline: 2px solid var(--p0); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ↑"; } th[aria-sort=descending] button::after { content: " ↓"; }
td.up { color: var(--up); } td.down { color: var(--down); } td.name { overflow-wrap: anywhere; min-width: 240px; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--soft); margin-bottom: 8px; }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 7px 12px; width: min(420px, 100%); margin: 0 12px 12px 0; }
.figure { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px;
  overflow-x: auto; }
svg { display: block; width: 100%; min-width: 640px; height: auto; font-size: 12.5px; }
svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 11px; text-anchor: middle; } svg .value { fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .zero { stroke: var(--soft); stroke-dasharray: 3 3; }
svg g.up { stroke: var(--up); fill: var(--up); } svg g.down { stroke: var(--down); fill: var(--down); }
svg g.even { stroke: var(--even); fill: var(--even); } svg g line { stroke-width: 2.5; stroke-linecap: round; }
svg rect.up { fill: var(--up); } svg rect.down { fill: var(--down); }
svg rect.bar { fill: var(--p1); }
svg .part0 { fill: var(--p0); } svg .part1 { fill: var(--p1); } svg .part2 { fill: var(--p2); }
svg .part3 { fill: var(--p3); } svg .part4 { fill: var(--p4); }
@media print { .tall { max-height: none; } .wide { overflow: visible; } }
"""

SCRIPT = """
const table = document.getElementById("tasks"), rows = [...table.tBodies[0].rows];
const search = document.getElementById("search"), shown = document.getElementById("shown");
function filter() {
  const words = search.value.toLowerCase().split(/\\s+/);
  let left = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every(word => text.includes(word));
    left += !row.hidden;
  }
  shown.textContent = `${left.toLocaleString("en")} of ${rows.length.toLocaleString("en")} tasks`;
}
function value(row, column) {
  const cell = row.cells[column], number = cell.dataset.n;
  return number === undefined ? cell.textContent : number === "" ? null : Number(number);
}
function sort(head, column) {
  const down = head.ariaSort !== "descending";
  for (const one of table.tHead.rows[0].cells) one.ariaSort = "none";
  head.ariaSort = down ? "descending" : "ascending";
  rows.sort((a, b) => {
    const x = value(a, column), y = value(b, column);
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" ? x - y : x.localeCompare(y);
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows);
}
[...table.tHead.rows[0].cells].forEach((head, column) =>
  head.firstElementChild.addEventListener("click", () => sort(head, column)));
search.addEventListener("input", filter);
filter();
"""
