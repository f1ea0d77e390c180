"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // A table's rows are its tbody elements: a model with the published row under it moves as one.
  const valueIn = (body, column) => {
    const cell = body.rows[0].cells[column];
    const number = cell.dataset.value ?? cell.textContent.trim();
    return number === "" || Number.isNaN(Number(number)) ? { text: cell.textContent.trim() } : { number: Number(number) };
  };
  const compare = (a, b, sign) => {
    if (a.number !== undefined && b.number !== undefined) return sign * (a.number - b.number);
    if (a.number !== undefined) return -1; // cells without a number stay last
    if (b.number !== undefined) return 1;
    return sign * a.text.localeCompare(b.text);
  };
  for (const table of all("table.sortable")) {
    table.tHead.addEventListener("click", (event) => {
      const header = event.target.closest("button.sort")?.parentElement;
      if (!header) return;
      const first = header.dataset.better === "max" ? "descending" : "ascending";
      const other = first === "descending" ? "ascending" : "descending";
      const order = header.getAttribute("aria-sort") === first ? other : first;
      for (const th of all("th[aria-sort]", table.tHead)) th.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const column = header.cellIndex;
      const bodies = [...table.tBodies].map((body) => [body, valueIn(body, column)]);
      bodies.sort((a, b) => compare(a[1], b[1], sign));
      for (const [body] of bodies) table.append(body);
    });
  }

  const tools = document.getElementById("tools");
  const filter = document.getElementById("filter");
  const count = document.getElementById("count");
  const bodies = all("#main-table tbody");
  const show = () => {
    const words = filter.value.toLowerCase().split(/[\s,]+/).filter(Boolean);
    let shown = 0;
    for (const body of bodies) {
      const model = body.dataset.model.toLowerCase();
      body.hidden = words.length > 0 && !words.some((word) => model.includes(word));
      shown += body.hidden ? 0 : 1;
    }
    count.textContent = words.length ? `${shown} of ${bodies.length} models` : "";
  };
  tools.hidden = false;
  filter.addEventListener("input", show);
  tools.addEventListener("submit", (event) => event.preventDefault());
  tools.addEventListener("change", (event) => {
    const box = event.target;
    if (box.id === "published") {
      for (const row of all("#main-table tr.published")) row.hidden = !box.checked;
    } else if (box.dataset.toggle !== undefined) {
      for (const cell of all(`#main-table [data-g="${box.dataset.toggle}"]`)) cell.hidden = !box.checked;
    }
  });

  const dialog = document.getElementById("origin");
  const content = document.getElementById("origin-body");
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a.cell");
    if (link) {
      event.preventDefault();
      content.replaceChildren();
      if (link.dataset.source) {
        const text = document.createElement("p");
        text.textContent = link.dataset.source;
        content.append(text);
      }
      if (link.dataset.like) {
        const text = document.createElement("p");
        text.textContent = `Not told apart from ${link.dataset.like}.`;
        content.append(text);
      }
      if (link.dataset.apart) {
        const text = document.createElement("p");
        text.textContent = `These weights differ on the test images from those of ${link.dataset.apart}.`;
        content.append(text);
      }
      for (const n of (link.dataset.runs ?? "").split(" ").filter(Boolean)) {
        const run = document.getElementById(`run-${n}`);
        const title = document.createElement("h3");
        title.append(...run.querySelector("summary").cloneNode(true).childNodes);
        content.append(title, run.querySelector("dl").cloneNode(true));
      }
      dialog.showModal();
      dialog.scrollTop = 0;
    } else if (event.target === dialog) {
      dialog.close(); // a click beside it
    }
  });
})();
