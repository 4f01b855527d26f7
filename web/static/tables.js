// Makes the headings of `table.sortable` sort their column: a button in the heading, `aria-sort` on it.
"use strict";

(() => {
  const number = (text) => {
    const value = Number(text);
    return text !== "" && Number.isFinite(value) ? value : null;
  };

  // What a cell sorts by: `data-sort`, or the exact value of the figure in it, or its text.
  function sortKey(cell) {
    if (!cell) return "";
    const exact = cell.dataset.sort ?? cell.querySelector("data")?.value;
    return number(exact ?? "") ?? cell.textContent.trim().toLowerCase();
  }

  function compare(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1;
    return a < b ? -1 : a > b ? 1 : 0;
  }

  function sortBy(table, column, heading) {
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const other = first === "descending" ? "ascending" : "descending";
    const order = heading.getAttribute("aria-sort") === first ? other : first;
    for (const th of table.tHead.rows[0].cells) th.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", order);
    const body = table.tBodies[0];
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows];
    // What stands for many owners stays at the end, and so do files that cannot be read.
    const fixed = rows.filter((row) => row.matches(".rest, .broken"));
    const sorted = rows
      .filter((row) => !row.matches(".rest, .broken"))
      .map((row) => [sortKey(row.cells[column]), row])
      .sort((a, b) => sign * compare(a[0], b[0]))
      .map((pair) => pair[1]);
    body.append(...sorted, ...fixed);
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sortBy(table, column, heading));
      heading.append(button);
    });
  }

  // Long tables show their first rows (in whichever order) until asked for all; without scripts all rows stand there.
  const SHOWN = 8; // as in heapledger.css
  for (const table of document.querySelectorAll("table.folded")) {
    const count = table.tBodies[0].rows.length;
    if (count <= SHOWN + 2) continue;
    table.classList.add("folding");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "link unfold";
    button.setAttribute("aria-controls", table.id);
    const label = () => {
      const open = table.classList.contains("unfolded");
      button.textContent = open ? `Show the first ${SHOWN}` : `Show all ${count}`;
      button.setAttribute("aria-expanded", String(open));
    };
    button.addEventListener("click", () => {
      table.classList.toggle("unfolded");
      label();
    });
    label();
    table.parentElement.after(button);
  }
})();
