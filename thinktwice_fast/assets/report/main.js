(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const axis = document.getElementById("axis");
  const figures = data.charts.map((chart) => {
    const figure = figureOf(chart, data.axes, () => axis.value);
    document.querySelector(`#${chart.section} .charts`).append(figure);
    return figure;
  });
  axis.addEventListener("change", () => figures.forEach((figure) => figure.redraw()));
  const browser = new Browser(data.pairs, document.getElementById("browser"));
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      browser.set({ show: button.dataset.show });
      document.getElementById("pairs").scrollIntoView();
    });
  }

  const theme = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement.style;
  const dark = () => (root.colorScheme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { theme.textContent = dark() ? "Light" : "Dark"; };
  theme.addEventListener("click", () => {
    root.colorScheme = dark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();

  for (const section of document.querySelectorAll("main > section")) {
    if (section.querySelector("figure, table, details, .facts, [role=option]")) continue;
    section.hidden = true;
    document.querySelector(`nav a[href="#${section.id}"]`).hidden = true;
  }
})();
