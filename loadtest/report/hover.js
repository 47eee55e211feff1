// Shows a chart's values under the pointer. The page is whole without it.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg.chart")) {
  const points = JSON.parse(svg.dataset.points);
  const cursor = svg.querySelector(".cursor");
  const hide = () => { tip.hidden = true; cursor.style.visibility = "hidden"; };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    let nearest = 0;
    points.x.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(points.x[nearest] - x)) nearest = i; });
    cursor.setAttribute("x1", points.x[nearest]);
    cursor.setAttribute("x2", points.x[nearest]);
    cursor.style.visibility = "visible";
    tip.replaceChildren(Object.assign(document.createElement("div"), { textContent: points.steps[nearest] }));
    for (const series of points.series) {
      const value = series.values[nearest];
      const row = document.createElement("div");
      const mark = Object.assign(document.createElement("span"), { className: series.colour, textContent: "● " });
      const number = Object.assign(document.createElement("b"), { textContent: value === null ? "none" : `${value} ${points.unit}` });
      row.append(mark, `${series.name}: `, number);
      tip.append(row);
    }
    tip.hidden = false;
    const width = tip.offsetWidth;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
  });
}
