// SPDX-License-Identifier: MPL-2.0

// Asks a URL and sends a datagram to ADDRESS PORT.
const [url, address, port] = process.argv.slice(2)
fetch(url).then(response => response.text()).then(body => {
  console.log(body.trim())
  const socket = require('dgram').createSocket('udp4')
  socket.send('?', Number(port), address, error => {
    console.log(error ? error.code : 'sent')
    socket.close()
  })
})
