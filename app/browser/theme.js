// Before anything is drawn: dark where the visitor's system is, or where the address asks for it as Gradio's pages do.
(() => {
    const asked = new URLSearchParams(location.search).get("__theme");
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const apply = () => document.documentElement.classList.toggle("dark", asked ? asked === "dark" : dark.matches);
    dark.addEventListener("change", apply);
    apply();
})();
