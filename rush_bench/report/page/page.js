"use strict";
// The page is whole without this. It sorts and filters tables, chooses columns, and shows titles at once, on touch and on focus too.
for (const grid of document.querySelectorAll("[data-grid]")) {
  const heads = [...grid.querySelectorAll("[data-head]")];
  const bodies = [...grid.querySelectorAll("tbody")];
  grid.querySelector(".tools").hidden = false;
  grid.querySelector("table").classList.add("cards");
  const value = (row, k) => {
    const cell = row.cells[k];
    return "v" in cell.dataset ? Number(cell.dataset.v) : heads[k].classList.contains("words") ? cell.textContent.trim() : null;
  };
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  heads.forEach((head, k) => {
    for (const row of grid.querySelectorAll("tbody tr:not(.block)")) {
      row.cells[k].dataset.label = head.textContent;
      row.cells[k].classList.toggle("nothing", ["", "–"].includes(row.cells[k].textContent));
    }
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") !== "ascending" : head.classList.contains("words");
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      for (const body of bodies) {
        const rows = [...body.rows].filter((row) => !row.classList.contains("block"));
        const keyed = rows.map((row) => [value(row, k), row]);
        keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : (up ? 1 : -1) * compare(a, b));
        body.append(...keyed.map(([, row]) => row));  // what has no number stays last
      }
    });
  });
  grid.querySelector("[data-filter]").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of grid.querySelectorAll("tbody tr:not(.block)")) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  });
  for (const box of grid.querySelectorAll("[data-column]")) {
    box.addEventListener("change", () => {
      for (const row of grid.querySelectorAll("tr:not(.block)")) row.cells[box.dataset.column].classList.toggle("off", !box.checked);
    });
  }
}
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg title")) {
  title.parentNode.dataset.tip = title.textContent;
  title.parentNode.setAttribute("aria-label", title.textContent);
  title.remove();
}
const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
for (const svg of document.querySelectorAll("figure svg")) {  // one tab stop a figure; arrows lead from point to point
  const points = [...svg.querySelectorAll(".tip")];
  svg.addEventListener("keydown", (event) => {
    const at = points.indexOf(event.target);
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const next = points[Math.max(0, Math.min(points.length - 1, at + steps[event.key]))];
    event.target.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  });
}
for (const element of document.querySelectorAll("main [title]")) {
  element.dataset.tip = element.title;
  element.setAttribute("aria-description", element.title);
  element.removeAttribute("title");
}
const show = (event) => {
  const from = event.target.closest && event.target.closest("[data-tip]");
  tip.hidden = !from;
  if (!from) return;
  tip.textContent = from.dataset.tip;
  const box = from.getBoundingClientRect(), room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(box.left, room)) + "px";
  const below = box.bottom + 8;
  tip.style.top = (below + tip.offsetHeight > innerHeight ? Math.max(8, box.top - tip.offsetHeight - 8) : below) + "px";
};
for (const name of ["mouseover", "focusin", "click"]) document.addEventListener(name, show);
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
const open = () => {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let around = target.closest("details"); around; around = around.parentElement.closest("details")) around.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", open);
open();
addEventListener("beforeprint", () => { for (const details of document.querySelectorAll("details:has(table, .notes)")) details.open = true; });
