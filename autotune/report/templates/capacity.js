"use strict";
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);

  // The figures name colours by token ("@s0"). The style sheet has the values, in any notation:
  // the browser says which colour that is now.
  const palette = () => {
    const probe = document.body.appendChild(document.createElement("span"));
    const known = new Map();
    const colour = (token) => {
      if (!known.has(token)) {
        probe.style.color = `var(--${token.slice(1)})`;
        known.set(token, getComputedStyle(probe).color);
      }
      return known.get(token);
    };
    return [colour, () => probe.remove()];
  };

  const themed = (value, colour) => {
    if (typeof value === "string") return /^@[a-z0-9]+$/.test(value) ? colour(value) : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, colour));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, colour)]));
    }
    return value;
  };

  const axis = (own) => ({
    gridcolor: "@line", linecolor: "@line", automargin: true, zeroline: false,
    fixedrange: matchMedia("(pointer: coarse)").matches, ...own,
  });

  const draw = () => {
    const [colour, done] = palette();
    const narrow = document.body.clientWidth < 600;
    for (const [key, figure] of Object.entries(figures)) {
      const layout = {
        height: 380 + (narrow ? 18 * figure.data.length : 0),
        margin: { l: 8, r: 12, t: 8, b: 8 },
        font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: "@fg" },
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        hovermode: "closest",
        hoverlabel: { bgcolor: "@panel", bordercolor: "@line", font: { color: "@fg" }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: "@muted", activecolor: "@fg" },
        showlegend: true,
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
        xaxis: axis(figure.layout.xaxis),
        yaxis: axis(figure.layout.yaxis),
      };
      Plotly.react("chart-" + key, themed(figure.data, colour), themed(layout, colour), {
        responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
        // plotly's own bar has a button that uploads the chart.
        showSendToCloud: false, plotlyServerURL: "",
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      });
    }
    done();
  };

  if (Object.keys(figures).length) {
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    // Paper is white, whatever the screen is.
    addEventListener("beforeprint", () => { root.dataset.print = ""; draw(); });
    addEventListener("afterprint", () => { delete root.dataset.print; draw(); });
  }

  // The table: sort by a column's button; what has no figure stays last.
  const table = document.getElementById("cells");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  const compare = (a, b, column, sign) => {
    const [x, y] = [a, b].map((row) => row.cells[column].dataset.sort);
    if (x === "" || y === "") return (x === "") - (y === "");
    const [p, q] = [Number(x), Number(y)];
    return sign * (Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y, "en", { numeric: true }) : p - q);
  };
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
      headers.forEach((each) => each.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", order);
      rows.sort((a, b) => compare(a, b, column, order === "ascending" ? 1 : -1));
      body.append(...rows);
    });
  });
})();
