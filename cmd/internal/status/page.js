// Brings the numbers up to date without a reload, while the page is seen.
'use strict';

const every = 2000; // ms
let timer;

async function update() {
	clearTimeout(timer);
	if (document.hidden) {
		return; // until it is seen again
	}
	const state = document.getElementById('live');
	try {
		const answer = await fetch('/', { cache: 'no-store' });
		const page = new DOMParser().parseFromString(await answer.text(), 'text/html');
		for (const part of ['now', 'numbers']) {
			document.getElementById(part).replaceWith(document.adoptNode(page.getElementById(part)));
		}
		state.textContent = 'live';
	} catch {
		state.textContent = 'no answer, trying again';
	}
	timer = setTimeout(update, every);
}

document.addEventListener('visibilitychange', update);
update();
