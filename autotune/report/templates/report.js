"use strict";
(() => {
  const root = document.documentElement;

  // Charts: the figures name colours by token ("@s0"); the style sheet has the values.
  const figures = JSON.parse(document.getElementById("figures").textContent);

  const themed = (value, css) => {
    if (typeof value === "string" && value.startsWith("@")) {
      return css.getPropertyValue("--" + value.slice(1)).trim() || value;
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, css));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, css)]));
    }
    return value;
  };

  const axis = (own) => ({
    gridcolor: "@line", zerolinecolor: "@line", linecolor: "@line", automargin: true,
    fixedrange: matchMedia("(pointer: coarse)").matches, zeroline: false, ...own,
  });

  const draw = () => {
    const css = getComputedStyle(root);
    const narrow = document.body.clientWidth < 600;
    for (const [key, figure] of Object.entries(figures)) {
      const layout = {
        ...figure.layout,
        // A narrow legend has one entry a line, above the plot.
        height: figure.height + (narrow ? 18 * figure.data.filter((t) => t.showlegend !== false).length : 0),
        margin: { l: 8, r: 12, t: 8, b: 8 },
        font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: "@fg" },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hoverlabel: { bgcolor: "@panel", bordercolor: "@line", font: { color: "@fg" }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: "@muted", activecolor: "@fg" },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
        xaxis: axis(figure.layout.xaxis),
        yaxis: axis(figure.layout.yaxis),
      };
      Plotly.react("chart-" + key, themed(figure.data, css), themed(layout, css), {
        responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
        // plotly's own bar has a button that uploads the chart.
        showSendToCloud: false, plotlyServerURL: "",
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      });
    }
  };

  if (Object.keys(figures).length) {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    // Paper is white, whatever the screen is.
    addEventListener("beforeprint", () => { root.dataset.print = ""; draw(); });
    addEventListener("afterprint", () => { delete root.dataset.print; draw(); });
  }

  // The table of trials: sort by a column's button, filter by words and outcome.
  const table = document.getElementById("trials");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const find = document.getElementById("find");
  const outcome = document.getElementById("outcome");

  const filter = () => {
    const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      const keep = wanted.every((word) => text.includes(word)) &&
        (!outcome.value || row.dataset.outcome === outcome.value);
      row.hidden = !keep;
      shown += keep;
    }
    document.getElementById("shown").textContent = `${shown} of ${rows.length}`;
  };
  find.addEventListener("input", filter);
  outcome.addEventListener("change", filter);
  filter(); // a reloaded page keeps what was typed

  const compare = (a, b, column, sign) => {
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.sort);
    if (x === "" || y === "") return (x === "") - (y === ""); // what was not measured stays last
    const [p, q] = [Number(x), Number(y)];
    return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q);
  };
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const first = header.classList.contains("num") ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = header.getAttribute("aria-sort") === first ? other : first;
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      rows.sort((a, b) => compare(a, b, column, order === "ascending" ? 1 : -1));
      body.append(...rows);
    });
  });
})();
