"""What a page is asked in the browser."""

from __future__ import annotations

# names beside points that are seen, and how many pairs of them lie on one another
OVER = """[...document.querySelectorAll('.plot')].map(plot => {
  const names = [...plot.querySelectorAll('.textpoint text')]
    .filter(x => x.textContent && getComputedStyle(x).visibility === 'visible');
  const boxes = names.map(x => x.getBoundingClientRect());
  const over = (a, b, one, other) => Math.min(a[other], b[other]) - Math.max(a[one], b[one]) > 2;
  const meet = (a, b) => over(a, b, 'left', 'right') && over(a, b, 'top', 'bottom');
  const pairs = boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b)));
  return [names.map(x => x.textContent), pairs.length];
}).filter(([names]) => names.length)"""
# points of plots on which a name lies
COVERED = """[...document.querySelectorAll('.plot')].flatMap(plot => {
  const boxes = (what) => [...plot.querySelectorAll(what)].map(x => x.getBoundingClientRect());
  const over = (a, b, one, other) => Math.min(a[other], b[other]) - Math.max(a[one], b[one]) > 2;
  const lies = (p) => (a) => over(a, p, 'left', 'right') && over(a, p, 'top', 'bottom');
  return boxes('.points .point').filter(p => boxes('.textpoint text').some(lies(p)));
}).length"""
