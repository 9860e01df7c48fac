// Tables whose columns sort: without this script they stay in the order they have.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const isNumber = head.classList.contains("number");
      const body = table.tBodies[0];
      const rows = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const value = isNumber ? parseFloat(cell.dataset.value) : cell.textContent;
        return { row, value, isMissing: isNumber && isNaN(value) };
      });
      const order = new Intl.Collator(undefined, { numeric: true }).compare;
      rows.sort((a, b) => {
        if (a.isMissing || b.isMissing) return a.isMissing - b.isMissing;
        const difference = isNumber ? a.value - b.value : order(a.value, b.value);
        return up ? difference : -difference;
      });
      body.append(...rows.map(({ row }) => row));
    });
  });
}
