"use strict";
(async () => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const places = [...document.querySelectorAll("[data-figure]")];

  async function load() {
    const packed = Uint8Array.from(atob(document.getElementById("library").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    if (!window.Plotly) throw new Error("the chart library did not start");
  }

  function layoutOf(figure) {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: color("--line"), zerolinecolor: color("--line"), linecolor: color("--line"), automargin: true };
    const given = figure.layout;
    return {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: color("--text"), size: 13, family: getComputedStyle(document.body).fontFamily },
      margin: { l: 10, r: 10, t: 10, b: 10 },
      hoverlabel: { bgcolor: color("--panel"), bordercolor: color("--line"), font: { color: color("--text") } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      dragmode: false,
      ...given,
      shapes: (given.shapes || []).map((shape) => ({ ...shape, line: { color: color("--quiet"), ...shape.line } })),
      xaxis: { ...axis, ...given.xaxis },
      yaxis: { ...axis, ...given.yaxis },
    };
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");

  async function draw() {
    for (const place of places) {
      const figure = figures[place.dataset.figure];
      await Plotly.react(place, figure.data, layoutOf(figure), { displayModeBar: false, responsive: true });
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  try {
    await load();
    await draw();
    dark.addEventListener("change", draw);
  } catch (error) {
    document.getElementById("undrawn").hidden = false;
    for (const place of places) place.hidden = true;
    document.documentElement.dataset.drawn = String(error);
  }
})();
