"use strict";

// Charts: the figures name colours by token ("@s0"); the style sheet has the values.
(() => {
  const root = document.documentElement;
  const source = document.getElementById("figures");
  const figures = source ? JSON.parse(source.textContent) : {};

  /** Return a function from a token to the colour it has now. */
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
    gridcolor: "@line", zerolinecolor: "@line", linecolor: "@line", automargin: true,
    fixedrange: matchMedia("(pointer: coarse)").matches, zeroline: false, ...own,
  });

  /** Run the charts' library: 5 MB that no reader of the answer and the table should wait for. */
  const loadLibrary = () => {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = document.getElementById("library").textContent;
    document.head.append(script); // runs at once; the page's policy knows its hash
  };

  const draw = (key) => {
    loadLibrary();
    const figure = figures[key];
    const narrow = document.body.clientWidth < 600;
    const entries = figure.data.filter((trace) => trace.showlegend !== false).length;
    const layout = {
      ...figure.layout,
      // A narrow legend has one entry a line, above the plot.
      height: figure.height + (narrow ? 18 * entries : 0),
      margin: { l: 8, r: 12, t: 8, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: "@fg" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hovermode: "closest",
      hoverlabel: { bgcolor: "@panel", bordercolor: "@line", font: { color: "@fg" }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: "@muted", activecolor: "@fg" },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      xaxis: axis(figure.layout.xaxis),
      yaxis: axis(figure.layout.yaxis),
    };
    const [colour, done] = palette();
    Plotly.react("chart-" + key, themed(figure.data, colour), themed(layout, colour), {
      responsive: true, displaylogo: false, displayModeBar: narrow ? false : "hover",
      // plotly's own bar has a button that uploads the chart.
      showSendToCloud: false, plotlyServerURL: "",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
    done();
  };

  // A chart is drawn when the reader comes near it: a page opens at once, however many it has.
  const drawn = new Set();
  const near = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      const key = target.id.replace("chart-", "");
      if (!isIntersecting || drawn.has(key)) continue;
      near.unobserve(target);
      drawn.add(key);
      draw(key);
    }
  }, { rootMargin: "600px" });
  addEventListener("load", () => {
    for (const key of Object.keys(figures)) near.observe(document.getElementById("chart-" + key));
  });

  const redraw = () => drawn.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new MutationObserver(redraw).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  // Paper is white, whatever the screen is, and shows every chart.
  addEventListener("beforeprint", () => {
    root.dataset.print = "";
    Object.keys(figures).forEach((key) => { drawn.add(key); draw(key); });
  });
  addEventListener("afterprint", () => { delete root.dataset.print; redraw(); });
})();

// Tables: sort by a column's button, filter by words and by the values of a facet, page through.
// A table with data beside it (id + "-data") makes its rows from that; another one has them already.
(() => {
  const PRINTED_ROWS = 500;

  const rowsFromPage = (table) => [...table.tBodies[0].rows].map((row) => ({
    text: row.textContent.toLowerCase(),
    keys: [...row.cells].map(({ dataset: { sort } }) =>
      sort === undefined || sort === "" ? null : Number.isNaN(Number(sort)) ? sort : Number(sort)),
    facet: (name) => row.dataset[name],
    element: () => row,
  }));

  const rowsFromData = (table, data) => {
    const kinds = [...table.tHead.rows[0].cells].map((header) => header.className);
    return data.marks.map((mark, index) => {
      const texts = data.texts.map((column) => column[index]);
      let made;
      const element = () => {
        if (made) return made;
        made = document.createElement("tr");
        made.className = mark;
        texts.forEach((text, column) => {
          const cell = document.createElement(column ? "td" : "th");
          if (!column) cell.scope = "row";
          cell.className = kinds[column];
          cell.textContent = text;
          made.append(cell);
        });
        if (data.tags[index]) {
          const tag = document.createElement("span");
          tag.className = "tag";
          tag.textContent = data.tags[index];
          made.cells[0].append(" ", tag);
        }
        return made;
      };
      return {
        text: [...texts, data.tags[index]].join(" ").toLowerCase(),
        keys: data.ranks.map((column) => column[index]),
        facet: (place) => data.facetValues[place][data.facets[place][index]],
        element,
      };
    });
  };

  const compare = (a, b, column, sign) => {
    const [x, y] = [a.keys[column], b.keys[column]];
    if (x === null || y === null) return (x === null) - (y === null); // not measured stays last
    return sign * (typeof x === "number" && typeof y === "number"
      ? x - y : String(x).localeCompare(String(y), "en", { numeric: true }));
  };

  const enhance = (table) => {
    const source = document.getElementById(table.id + "-data");
    const data = source && JSON.parse(source.textContent);
    const rows = data ? rowsFromData(table, data) : rowsFromPage(table);
    const pageRows = data ? data.pageRows : Infinity;
    const box = table.closest("section") || document;
    const find = box.querySelector("input[type=search]");
    const facets = [...box.querySelectorAll("select")];
    const shown = box.querySelector("[role=status]");
    const pager = box.querySelector(".pager");
    let page = 0;

    const matching = () => {
      const wanted = (find ? find.value : "").toLowerCase().split(/\s+/).filter(Boolean);
      const chosen = facets.filter((select) => select.value)
        .map((select) => [select.dataset.facet || select.id, select.value]);
      return rows.filter((row) => wanted.every((word) => row.text.includes(word)) &&
        chosen.every(([name, value]) => row.facet(name) === value));
    };

    const show = (first, most) => {
      const found = matching();
      const part = found.slice(first, first + most);
      table.tBodies[0].replaceChildren(...part.map((row) => row.element()));
      const count = (number) => number.toLocaleString("en");
      if (shown) {
        const all = found.length === rows.length ? count(rows.length) : `${count(found.length)} of ${count(rows.length)}`;
        shown.textContent = part.length < found.length
          ? `${count(first + 1)} to ${count(first + part.length)} of ${count(found.length)}` +
            (found.length < rows.length ? ` found among ${count(rows.length)}` : "")
          : `${all} shown`;
      }
      if (pager) {
        const [previous, next] = pager.querySelectorAll("button");
        pager.hidden = found.length <= pageRows;
        previous.disabled = first === 0;
        next.disabled = first + most >= found.length;
      }
    };
    const update = () => show(page * pageRows || 0, pageRows);
    const restart = () => { page = 0; update(); };

    if (find) find.addEventListener("input", restart);
    facets.forEach((select) => select.addEventListener("change", restart));
    if (pager) {
      const scroller = table.closest(".scroll");
      pager.querySelectorAll("button").forEach((button, index) =>
        button.addEventListener("click", () => {
          page += index ? 1 : -1;
          update();
          if (scroller) scroller.scrollTop = 0;
        }));
    }

    const headers = [...table.tHead.rows[0].cells];
    headers.forEach((header, column) => {
      const button = header.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const first = header.classList.contains("num") ? "descending" : "ascending";
        const other = first === "ascending" ? "descending" : "ascending";
        const order = header.getAttribute("aria-sort") === first ? other : first;
        headers.forEach((each) => each.removeAttribute("aria-sort"));
        header.setAttribute("aria-sort", order);
        rows.sort((a, b) => compare(a, b, column, order === "ascending" ? 1 : -1));
        restart();
      });
    });

    addEventListener("beforeprint", () => show(0, PRINTED_ROWS));
    addEventListener("afterprint", update);
    if (find && (find.value || facets.some((select) => select.value))) update(); // a reloaded page
    else if (!data) update();
  };

  document.querySelectorAll("table").forEach((table) => {
    if (table.tHead && table.tHead.querySelector("button")) enhance(table);
  });
})();
