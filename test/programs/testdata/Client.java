// SPDX-License-Identifier: MPL-2.0

import java.net.DatagramPacket;
import java.net.DatagramSocket;
import java.net.InetSocketAddress;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;

/** Asks a URL, by a socket of IPv6 as a JVM has them, and sends a datagram to ADDRESS PORT. */
public class Client {
    public static void main(String[] args) throws Exception {
        var request = HttpRequest.newBuilder(URI.create(args[0])).build();
        System.out.println(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body().strip());
        try (var socket = new DatagramSocket()) {
            socket.send(new DatagramPacket(new byte[1], 1, new InetSocketAddress(args[1], Integer.parseInt(args[2]))));
            System.out.println("sent");
        } catch (java.io.IOException e) {
            System.out.println(e.getMessage());
        }
    }
}
