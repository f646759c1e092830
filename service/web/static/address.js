// What a page shows stands in its address, so that it can be sent on and comes back on a reload.
export const recall = (name, usual) => new URLSearchParams(location.search).get(name) ?? usual;

export function remember(name, value, usual) {
  const asked = new URLSearchParams(location.search);
  if (String(value) === String(usual)) asked.delete(name);
  else asked.set(name, value);
  const text = asked.toString();
  history.replaceState(null, "", location.pathname + (text && `?${text}`));
}
